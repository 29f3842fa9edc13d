"""`python -m jobs.tune_batch --config FILE`: the micro-batch that fits, the critical batch size, and what to set."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from cluster.capacity import Waiting, await_workers
from cluster.connect import connected, hardware, head_address
from cluster.head import HeadWatch
from cluster.workers import Needs, WorkerPlan, total_cpus
from jobs.exit_code import exit_code_of, take_over_signals
from llm.config import RunConfig
from llm.config_file import load_run
from llm.observe.quiet import redirect_noise
from llm.storage import is_s3, join, write_bytes
from llm.train.prepare import Prepared, prepare
from llm.train.runs import run_uri
from llm.train.tune.advice import advise
from llm.train.tune.auto import Record, write_record
from llm.train.tune.collect import Measured, search_largest
from llm.train.tune.noise_scale import StepNorms, estimate, without_the_start
from llm.train.tune.norms_file import read_norms
from llm.train.tune.plan import for_noise, for_probes, require_something_fits
from llm.train.tune.report import Findings, as_json, as_page, recommendation, summary_table

FOLDER = "tune_batch"


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 with a recommendation, 130 after Ctrl-C, else the error's, whose text is on stderr."""
    started_at_s = time.time()
    parser = argparse.ArgumentParser(prog="headrace tune_batch", description="Find the batch size from a few measurements.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run, in YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key: parallel.zero_stage=3")
    parser.add_argument("--memory-gib", type=_positive, metavar="X", help="what a worker may take; default: what its hardware has")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of the run that measures gradient noise; 0: none (default 60)")
    parser.add_argument("--keep-batch", action="store_true", help="recommend no other train.batch_rows")
    options = parser.parse_args(argv)

    def run() -> int:
        config = load_run(options.config, options.set)
        _write(tune(config, started_at_s, options.memory_gib, options.steps, options.keep_batch))
        return 0

    return exit_code_of(run, "nothing of it is kept")


def tune(config: RunConfig, started_at_s: float, memory_gib: float | None, steps: int, keep_batch: bool) -> Findings:
    """Measures on the cluster of RAY_ADDRESS, or on a private one on this machine. Of a batch that grows, the largest is what must fit."""
    largest = config.train.model_copy(update={"batch_rows": max(config.train.batch_sizes), "batch_schedule": []})
    config = config.model_copy(update={"train": largest})
    uri = join(run_uri(config), FOLDER)
    prepared = prepare(config, uri, started_at_s)
    parallel, data = config.parallel, config.data
    cpus = total_cpus(parallel.workers, data.windows_ahead)
    logs = Path(tempfile.gettempdir() if is_s3(uri) else uri) / "logs" / "driver.log"
    with redirect_noise(logs), tempfile.TemporaryDirectory() as ray_folder, connected(cpus):
        take_over_signals()  # Ray has put its own handlers in their place
        waiting = Waiting(parallel.wait_nodes_s, print, HeadWatch(head_address()).look)
        plan = await_workers(Needs(parallel.workers, parallel.tensor, data.windows_ahead, parallel.device), waiting)
        kind = hardware(plan.gpus_per_worker > 0)
        measured = _probe(prepared, plan, None if memory_gib is None else int(memory_gib * 2**30))
        usable = require_something_fits(config, measured)
        norms = _noise(prepared, plan, usable, steps, ray_folder)
    used = without_the_start(norms)
    tokens_a_row = sum(n.big_tokens for n in used) / len(used) / config.train.batch_rows if used else float(data.seq_len)
    noise = estimate(used)
    assert measured.speed is not None, "what fits has been timed"
    advice = advise(
        measured.speed,
        fits_rows=usable,
        batch_rows=config.train.batch_rows,
        data_size=parallel.data_size,
        row_tokens=data.seq_len,
        noise=noise,
        tokens_a_row=tokens_a_row,
        keep_batch=keep_batch,
    )
    search, rows = measured.search, advice.now.microbatch_rows
    assert search.largest is not None and search.limit_bytes is not None
    peak = next(peak for size, peak in sorted(search.peaks.items()) if size >= rows)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    write_record(prepared.job, kind, Record(rows, search.largest, search.limit_bytes, peak, at))
    return Findings(config, kind, measured, advice, noise, norms, tokens_a_row)


def _probe(prepared: Prepared, plan: WorkerPlan, limit_bytes: int | None) -> Measured:
    from llm.train.launch import WorkerResources  # imports Ray, which must be connected first
    from llm.train.tune.ray_probes import RayProbes

    job = for_probes(prepared.job)
    start = RayProbes(job, WorkerResources(plan.cpus_per_worker, plan.gpus_per_worker))
    return search_largest(job.config.rank_rows, limit_bytes, start, print, job.config.recovery.long_phase_s)


def _noise(prepared: Prepared, plan: WorkerPlan, at_most: int, steps: int, ray_folder: str) -> list[StepNorms]:
    job = for_noise(prepared.job, at_most, steps)
    if job is None:
        return []
    from llm.train.launch import WorkerResources, fit

    head = HeadWatch(head_address())
    print(f"gradient noise: {job.noise_steps} steps on the run's own data, micro-batches of {job.config.microbatch_rows} rows")
    fit(job, prepared.recipe, WorkerResources(plan.cpus_per_worker, plan.gpus_per_worker), ray_folder, head.look)
    return read_norms(job)


def _write(found: Findings) -> None:
    uri, s3 = join(run_uri(found.config), FOLDER), found.config.s3
    write_bytes(join(uri, "tune_batch.json"), (json.dumps(as_json(found), indent=1) + "\n").encode(), s3)
    write_bytes(join(uri, "tune_batch.html"), as_page(found).encode(), s3)
    lines = summary_table(found)
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:{width}}  {figure}" for name, figure in lines))
    print(f"\nrecommended: {recommendation(found)}")
    rows, batch_rows = found.advice.now.microbatch_rows, found.config.train.batch_rows
    print(f"{join(uri, 'tune_batch.html')} shows the trade-off")
    print(f"with train.batch_rows={batch_rows} as it is, train.microbatch_rows=auto takes {rows} rows from now on")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, such as 1.5")
    return value


if __name__ == "__main__":
    sys.exit(main())
