"""`python -m jobs.trace --run RUN --step S`: the documents that made a step's batch, and whether the corpus still gives it."""

from __future__ import annotations

import argparse
import sys

from llm.config import S3Section
from llm.data.trace import StepTrace, TracedRun
from llm.errors import HeadraceError

DIFFERS, SHOWN_DIFFERENCES = 1, 5


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 where all agrees with the run's ledger, 1 where it differs, else the error's."""
    parser = argparse.ArgumentParser(prog="headrace trace", description="From a step back to its documents.")
    parser.add_argument("--run", required=True, metavar="RUN", help="the run's folder, local or s3://")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, metavar="S", help="print the documents of this step, 1 to the last")
    what.add_argument("--verify", action="store_true", help="find the first step that the corpus no longer gives as it was")
    what.add_argument("--against", metavar="RUN", help="find the first step at which this run's ledger parts from the other's")
    options = parser.parse_args(argv)
    try:
        run = TracedRun(options.run, S3Section())
        if options.against:
            step = run.first_difference(TracedRun(options.against, S3Section()))
            if step is None:
                print(f"the ledgers agree up to step {run.last_step}")
                return 0
            print(f"the ledgers part at step {step}")
            trace = run.trace(step)
        else:
            trace = run.first_unverified() if options.verify else run.trace(options.step)
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if trace is None:
        print(f"verified: the corpus gives steps 1 to {run.last_step} as the run recorded them")
        return 0
    print_trace(trace)
    if not trace.verified:
        print(f"step {trace.step} is not what the run was trained on: ledger {trace.ledger} now, {trace.recorded} then", file=sys.stderr)
        for line in run.differences()[:SHOWN_DIFFERENCES]:
            print(f"  {line}", file=sys.stderr)
    return 0 if trace.verified and not options.against else DIFFERS


def print_trace(trace: StepTrace) -> None:
    begins = trace.begins
    print(f"step {trace.step}: from epoch {begins.epoch}, window {begins.window}, row {begins.offset} on")
    print(f"ledger {trace.recorded}{', verified' if trace.verified else ''}")
    if trace.outcome:
        print(f"not trained on: {trace.outcome}")
    print("row  tokens         document  (place in its file, first of its tokens here)")
    for piece in trace.pieces:
        tokens = f"{piece.column}-{piece.column + piece.length - 1}"
        print(f"{piece.row:3}  {tokens:13}  {piece.uri}  {piece.position}  {piece.offset}")


if __name__ == "__main__":
    sys.exit(main())
