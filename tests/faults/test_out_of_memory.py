"""Ray's memory monitor kills a worker because its node has no memory left: the run says so, and ends as the undisturbed one."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from llm.metrics import rows_of
from tests.kills import Watched, finish, ledger, train_workers
from tests.small_run import start_run

SETTINGS = (
    "train.steps=400",
    "checkpoint.every_steps=20",
    "eval.rows=0",
    "export.enabled=false",
    "parallel.workers=2",
    "recovery.max_without_progress=100",
    "recovery.max_out_of_memory=100",
)
GIB = 1 << 30
RUN_BYTES = 3 * GIB  # what the run itself uses, generously
ROOM_BYTES = 1 * GIB  # between that and the threshold
BALLOON_BYTES = 6 * GIB  # at most, and never into the machine's last 2 GiB


def fill_memory_until_one_dies(workers: list[int]) -> None:
    """Returns with the memory freed again when one of the processes is gone."""
    balloon: list[bytes] = []
    try:
        deadline_s = time.monotonic() + 120
        while all(psutil.pid_exists(worker) for worker in workers):
            assert time.monotonic() < deadline_s, f"no worker was killed, with {len(balloon) / 8:.1f} GiB held"
            if len(balloon) < BALLOON_BYTES // (GIB // 8) and psutil.virtual_memory().available > 2 * GIB:
                balloon.append(b"\x01" * (GIB // 8))  # written, so that it is there
            time.sleep(0.02)
    finally:
        balloon.clear()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_worker_killed_for_memory_is_told_as_such_and_the_run_ends_the_same(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + RUN_BYTES + ROOM_BYTES) / memory.total
    with monkeypatch.context() as settings:
        settings.setenv("RAY_memory_usage_threshold", f"{threshold:.4f}")
        settings.setenv("RAY_memory_monitor_refresh_ms", "50")
        run = Watched(start_run(recipe, *SETTINGS, "run.name=killed"), recipe.parent / "runs" / "killed")
    run.await_row("step", count=30)
    fill_memory_until_one_dies(train_workers(run.process.pid))
    restart = rows_of(run.await_row("event", "restart"), "event", "restart")[0]
    assert restart["cause"] == "out of memory", restart
    finish(run.process)
    finish(start_run(recipe, *SETTINGS, "run.name=whole"))
    assert ledger(run.run) == ledger(run.run.with_name("whole"))
