"""From the kill of a worker to the next optimizer step, through Ray: how long, and where the time goes.

    python -m tests.bench.recovery [--kills 5] [--workers 2]

One run as a user starts it (the small one of the tests, on a private cluster of this machine). A random worker is killed with SIGKILL
while it trains, the run recovers by itself, and after some more steps the next one is killed. Wall time on this machine with whatever else
ran on it, so the load is printed too.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path

from llm.metrics import rows_of
from tests.kills import Watched
from tests.small_run import start_run, write_small_run

SETTINGS = ("train.steps=1000000", "eval.rows=0", "export.enabled=false", "checkpoint.every_steps=5", "recovery.max_crashes=1000")


def main() -> None:
    parser = argparse.ArgumentParser(description="from kill -9 of a worker to the next optimizer step")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.kills, options.workers)
    width = max(len(name) for kill in found for name in kill)
    for name in dict.fromkeys(name for kill in found for name in kill):
        values = [kill.get(name, 0.0) for kill in found]
        print(f"{name:<{width}}  {statistics.median(values):6.1f}   " + " ".join(f"{value:5.1f}" for value in values))


def measure(folder: Path, kills: int, workers: int, seed: int = 0) -> list[dict[str, float]]:
    """Of each kill, in seconds: the whole time until the next step had ended, and its parts; the load of the machine before it."""
    chance, found = random.Random(seed), []
    process = start_run(write_small_run(folder), *SETTINGS, f"parallel.workers={workers}")
    run = Watched(process, folder / "runs" / "small")
    try:
        run.await_row("step", count=8)
        for _ in range(kills):
            load = os.getloadavg()[0]
            run.kill_one(chance)
            killed_at_s = time.time()
            rows = run.await_row("event", "restart")
            restart = rows_of(rows, "event", "restart")[0]
            rows = rows[rows.index(restart) :]
            first = (rows_of(rows, "step") or rows_of(run.await_row("step"), "step"))[0]
            began_at_s, noticed_at_s = restart["written_at_s"], restart["written_at_s"] - restart["down_s"] + restart["noticed_s"]
            parts = {"until the failure is known": noticed_at_s - killed_at_s, **restart["phases"]}
            parts["all else before the first step"] = began_at_s - killed_at_s - sum(parts.values())
            parts["the first step"] = first["written_at_s"] - began_at_s
            found.append({"kill to the next step": first["written_at_s"] - killed_at_s, **parts, "load before": load})
            print(f"back at step {restart['step']} after {found[-1]['kill to the next step']:.1f} s", flush=True)
            run.await_row("step", count=8)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    return found


if __name__ == "__main__":
    main()
