"""`python -m jobs.sweep --config FILE [--set a.b=c ...]`: which settings train best, and how sure that is."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import partial

from cluster.capacity import Waiting, await_trials
from cluster.connect import connected, head_address, is_private
from cluster.head import HeadWatch
from cluster.workers import Needs, total_cpus
from jobs.exit_code import exit_code_of, take_over_signals
from llm.errors import TrainingError
from llm.observe.quiet import quiet_search
from llm.observe.sweep_report import write_sweep_report
from llm.observe.sweep_table import SweepTable
from llm.search.searchers import searcher_of
from llm.search.study import Study
from llm.search.sweep_config import Sweep, load_sweep
from llm.search.trials import best_of
from llm.storage import join, write_bytes
from llm.train.lease import Lease, held_lease

TRIAL_COMMAND = (sys.executable, "-m", "jobs.pretrain", "--config")


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when the sweep ended with a best trial, 1 where all failed, 130 after Ctrl-C, else the error's."""
    parser = argparse.ArgumentParser(prog="headrace sweep", description="Search the settings of a run that train best.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the sweep, in YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the run: train.steps=400")
    options = parser.parse_args(argv)
    return exit_code_of(
        lambda: sweep(load_sweep(options.config, options.set)), "the same command goes on with the trials that had not ended"
    )


def sweep(asked: Sweep) -> int:
    """Searches until the budget is used up, then writes `report.html` and `best.yaml` beside the trials."""
    with held_lease(asked.uri, asked.base.s3, asked.base.recovery.lease_s) as lease, SweepTable(asked.file.sweep.name) as table:
        study = Study(asked, searcher_of(asked), TRIAL_COMMAND, table.show)
        _search(study, lease)
        table.show(study)
        report, path, best = write_sweep_report(study), join(asked.uri, "best.yaml"), best_of(study.trials)
        if best is not None:
            write_bytes(path, asked.best(study.configs[best.number]).encode(), asked.base.s3)
    if best is None:
        raise TrainingError(
            f"no trial of {asked.uri} came to an evaluation. Mend what ended them, see {report}, and choose another sweep.name."
        )
    table.conclude(study, best, path, report)
    return 0


def _search(study: Study, lease: Lease) -> None:
    from llm.search.tuner import TRIAL_CPUS, search  # imports Ray when it is called

    base, limit = study.sweep.base, study.sweep.file.budget.max_concurrent
    workers, windows = study.sweep.most("parallel", "workers"), study.sweep.most("data", "windows_ahead")
    tensor = study.sweep.most("parallel", "tensor")
    tensor = tensor if workers % tensor == 0 else 1
    show = partial(print, file=sys.stdout, flush=True)  # bound now: quiet_search redirects stdout
    cpus = TRIAL_CPUS + total_cpus(workers, windows)
    at_once = limit or max(1, (os.cpu_count() or 1) // workers)
    with tempfile.TemporaryDirectory() as folder, quiet_search(study.sweep.uri), connected(cpus * at_once):
        take_over_signals()  # Ray has put its own handlers in their place
        head = HeadWatch(head_address())

        def watch() -> None:
            lease.require()
            head.look()

        if not is_private():
            waiting = Waiting(base.parallel.wait_nodes_s, show, watch)
            needs = Needs(workers, tensor, windows, base.parallel.device)
            at_once = await_trials(limit, TRIAL_CPUS, needs, waiting)
        search(study, at_once, folder, watch)


if __name__ == "__main__":
    sys.exit(main())
