"""Ray's own memory monitor kills a worker of a node that runs out of memory: the restart names the cause, and the run ends the same."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm.metrics import rows_of
from tests.kills import Watched, finish, ledger, train_workers
from tests.small_run import start_run

RUN_BYTES = 7 << 30  # more than the run and Ray's processes take, and others on this machine meanwhile
BALLOON_BYTES, PIECE_BYTES = 6 << 30, 128 << 20
SETTINGS = ("train.steps=300", "checkpoint.every_steps=10", "eval.rows=0", "export.enabled=false", "parallel.workers=2")
PATIENT = ("recovery.max_out_of_memory=20", "recovery.max_without_progress=20", "recovery.first_wait_s=0")

# Memory that is really there: every page is written to. Ends by itself where the test is killed.
BALLOON = f"""
import time
held = []
for _ in range({BALLOON_BYTES // PIECE_BYTES}):
    held.append(b"x" * {PIECE_BYTES})
    time.sleep(0.1)
time.sleep(20)
"""


def squeeze(run: Watched) -> None:
    """Takes memory until one of the run's workers is gone, and gives it back at once: the workers that follow shall live."""
    workers = train_workers(run.process.pid)
    balloon = subprocess.Popen([sys.executable, "-c", BALLOON])
    try:
        while set(workers) <= set(train_workers(run.process.pid)):
            assert balloon.poll() is None, "Ray killed no worker"
            time.sleep(0.05)
    finally:
        balloon.kill()
        balloon.wait()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_worker_that_ray_kills_for_want_of_memory_restarts_by_that_name(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    total, used = get_system_memory(), get_used_memory()
    if total - used < RUN_BYTES + BALLOON_BYTES:
        pytest.skip(f"needs {(RUN_BYTES + BALLOON_BYTES) >> 30} GiB of free memory; there are {(total - used) >> 30}")
    with monkeypatch.context() as patch:
        patch.setenv("RAY_memory_usage_threshold", f"{(used + RUN_BYTES) / total:.4f}")
        patch.setenv("RAY_memory_monitor_refresh_ms", "100")
        run = Watched(start_run(recipe, *SETTINGS, *PATIENT, "run.name=squeezed"), recipe.parent / "runs" / "squeezed")
    run.await_row("step", count=25)
    squeeze(run)
    restart = rows_of(run.await_row("event", "restart"), "event", "restart")[0]
    finish(run.process)
    assert restart["cause"] == "out of memory", restart
    whole = recipe.parent / "runs" / "whole"
    finish(start_run(recipe, *SETTINGS, "run.name=whole"))
    assert ledger(run.run) == ledger(whole) and [step for step, _ in ledger(whole)] == list(range(1, 301))
