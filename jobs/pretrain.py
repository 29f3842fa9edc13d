"""`python -m jobs.pretrain --config FILE [--set a.b=c ...]`: raw text to a trained, exported model."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from cluster.capacity import Waiting, await_workers
from cluster.connect import connected, hardware, head_address, is_private
from cluster.head import HeadWatch
from cluster.workers import Needs, total_cpus
from jobs.exit_code import exit_code_of, take_over_signals
from llm.config import RunConfig
from llm.config_file import dump_run, load_run
from llm.job import Job
from llm.metrics import Row
from llm.observe.exported import LiveRun
from llm.observe.progress import ProgressLine
from llm.observe.quiet import redirect_noise
from llm.observe.watch import RunWatcher
from llm.storage import is_s3
from llm.train.lease import Lease, held_lease
from llm.train.prepare import Prepared, prepare
from llm.train.runs import claim_run, record_config, record_run, require_finished, run_uri
from llm.train.tune.auto import decide, decided, is_open


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when the run ended, 130 after Ctrl-C, else the error's, whose text is on stderr."""
    started_at_s = time.time()
    parser = argparse.ArgumentParser(prog="headrace pretrain", description="Train a language model from raw text.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run, in YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key: train.lr=1e-3")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    options = parser.parse_args(argv)

    def run() -> int:
        config = load_run(options.config, options.set)
        if options.print_config:
            print(dump_run(config), end="")
        else:
            pretrain(config, started_at_s)
        return 0

    return exit_code_of(run, "the same command goes on from the last checkpoint")


def pretrain(config: RunConfig, started_at_s: float) -> None:
    """One run on the cluster of RAY_ADDRESS, or on a private one on this machine."""
    claim = claim_run(config)
    config = claim.config
    if claim.note:
        print(claim.note)
    if claim.finished:
        return
    uri = run_uri(config)
    if not is_private() and not is_s3(config.run.storage) and not Path(config.run.storage).is_absolute():
        print(
            f"note: run.storage={config.run.storage} is relative, so this run is kept in {uri} on the head node, where a submitted job's "
            "folder is removed later. Set run.storage to a shared folder or s3://bucket/prefix to keep it."
        )
    with ProgressLine(config.train.steps, every_steps=config.log.every_steps) as progress:
        with progress.phase("reading the corpus and the tokenizer"):
            prepared = prepare(config, uri, started_at_s)
        with held_lease(uri, config.s3, config.recovery.lease_s, progress.note) as lease:
            record_run(config, prepared.stream.files, prepared.job.tokenizer.fingerprint)
            watcher = RunWatcher(uri, config.s3, config.log, config.model_dump(), progress)
            with redirect_noise(watcher.folder / "logs" / "driver.log"), tempfile.TemporaryDirectory() as ray_folder:
                try:
                    _train(config, prepared, watcher, lease, Path(ray_folder))
                    require_finished(config)
                except BaseException:
                    watcher.abandon()
                    raise
            watcher.finish()


def _train(config: RunConfig, prepared: Prepared, watcher: RunWatcher, lease: Lease, ray_folder: Path) -> None:
    parallel = config.parallel
    least = parallel.min_workers or parallel.workers
    cpus = total_cpus(parallel.workers, config.data.windows_ahead)
    with ExitStack() as stack:
        with watcher.progress.phase("connecting to Ray"):
            stack.enter_context(connected(cpus))
        take_over_signals()  # Ray has put its own handler in their place
        head = HeadWatch(head_address())

        def keep() -> None:
            lease.require()
            head.look()

        waiting = Waiting(parallel.wait_nodes_s, watcher.progress.note, keep)
        plan = await_workers(Needs(least, parallel.tensor, config.data.windows_ahead, parallel.device), waiting)
        job = replace(prepared.job, fence=lease.fence.check)
        if is_open(config):
            job = _with_microbatch(config, job, watcher, hardware(plan.gpus_per_worker > 0))
        watcher.progress.waiting("starting the workers")
        from llm.train.launch import WorkerResources, fit  # imports Ray, which must be connected first

        show = _shown_by_ray(config, job, watcher)

        def watch() -> None:
            show(watcher.poll())
            keep()

        resources = WorkerResources(plan.cpus_per_worker, plan.gpus_per_worker)
        fit(job, prepared.recipe, resources, str(ray_folder), watch)


def _shown_by_ray(config: RunConfig, job: Job, watcher: RunWatcher) -> Callable[[Sequence[Row]], None]:
    """What takes the run's new rows to Ray's metrics. A private cluster, which nobody watches, has none."""
    if is_private():
        return lambda rows: None
    from llm.train.ray_metrics import RayMetrics

    live = LiveRun(watcher.rows, job.started_at_s, time.time(), config.parallel.workers, config.log.dollars_per_worker_hour)
    return RayMetrics(config.run.name, live).show


def _with_microbatch(config: RunConfig, job: Job, watcher: RunWatcher, kind: str) -> Job:
    """The job with what `train.microbatch_rows: auto` is here, which the run's record gets too."""
    at_most, told = decide(job, kind)
    record_config(decided(config, at_most))
    watcher.settings = decided(config, at_most).model_dump()
    if told:
        watcher.progress.note(told)
    return replace(job, config=decided(job.config, at_most))


if __name__ == "__main__":
    sys.exit(main())
