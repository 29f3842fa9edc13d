"""A rank that sleeps, or whose process is stopped, is found in time and named, with everybody's stacks, at gloo level."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from llm.train.watchdog import Watchdog
from tests.distributed.layouts import run_ranks

HANG_S = 5.0
WORLD = 3


def work(rank: int, world_size: int, logs: str, hang_rank: int, how: str) -> tuple[float, str] | None:
    """Steps that are all-reduces; in step 12 one rank does not come. What this rank's watchdog says, and after how long."""
    import torch
    import torch.distributed as dist

    told: list[tuple[float, str]] = []
    watchdog = Watchdog(
        rank, world_size, Path(logs), hang_s=HANG_S, long_phase_s=600, on_hang=lambda error: told.append((time.monotonic(), str(error)))
    )
    watchdog.start(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    import threading

    began_s = 0.0

    def train() -> None:
        nonlocal began_s
        watchdog._thread_id = threading.get_ident()
        for step in range(1, 100):
            with watchdog.phase("waiting for data"):
                time.sleep(0.01)
            watchdog.begin_step(step)
            began_s = time.monotonic()
            if step == 12 and rank == hang_rank:
                if how == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                else:
                    asleep_in_forward()
            dist.all_reduce(torch.ones(4))
            watchdog.end_step()

    threading.Thread(target=train, daemon=True).start()
    if rank == hang_rank and how == "stop":
        time.sleep(60)  # stopped: the test ends it
    deadline = time.monotonic() + 40
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    return (told[0][0] - began_s, told[0][1]) if told else None


def asleep_in_forward() -> None:
    time.sleep(60)


def no_hang(rank: int, world_size: int, logs: str) -> list[str]:
    told: list[str] = []
    watchdog = Watchdog(rank, world_size, Path(logs), hang_s=1.0, long_phase_s=600, on_hang=lambda error: told.append(str(error)))
    watchdog.start(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    for step in range(1, 4):
        watchdog.begin_step(step)
        time.sleep(0.3 if step > 1 else 2.0)  # the first step has the time of a long phase
        watchdog.end_step()
    with watchdog.phase("save"):
        time.sleep(3.0)
    watchdog.close()
    return told


def test_a_batch_that_has_grown_is_given_longer_by_as_much(tmp_path):
    watchdog = Watchdog(0, 1, tmp_path, hang_s=1.0, long_phase_s=600, on_hang=lambda error: None)
    for step in range(1, 5):
        watchdog.begin_step(step, 8)
        time.sleep(0.3)
        watchdog.end_step()
    watchdog.begin_step(5, 8)
    of_8_rows_s = watchdog.allowed_s()
    assert of_8_rows_s >= 5 * 0.3
    watchdog.begin_step(5, 64)
    assert watchdog.allowed_s() == pytest.approx(8 * of_8_rows_s)
    watchdog.begin_step(5, 1)
    assert watchdog.allowed_s() == of_8_rows_s, "a smaller one no less: what a step costs besides its rows stays"


def test_a_rank_that_does_not_arrive_is_named_by_every_rank(tmp_path):
    found = run_ranks(work, WORLD, str(tmp_path), 1, "sleep")
    for rank, said in enumerate(found):
        assert said is not None, f"rank {rank} saw no hang"
        took_s, text = said
        assert took_s <= HANG_S + 0.5, text
        assert "rank 1 did not arrive" in text and "asleep_in_forward" in text, text
        stacks = (tmp_path / f"hang-rank-{rank:05d}.txt").read_text()
        assert ("asleep_in_forward" in stacks) == (rank == 1) and "fetch" not in stacks


@pytest.mark.parametrize("stopped", [0, pytest.param(2, marks=pytest.mark.faults)])
def test_a_rank_whose_process_is_stopped_is_named(tmp_path, stopped):
    """Rank 0 holds the store through which the ranks tell each other."""
    with pytest.raises(TimeoutError):
        run_stopped(tmp_path, stopped)
    texts = [(tmp_path / f"said-{rank}.txt").read_text() for rank in range(WORLD) if rank != stopped]
    for text in texts:
        took_s, said = text.split(" ", 1)
        assert f"rank {stopped} does not answer" in said, said
        assert float(took_s) <= 2 * HANG_S, said


def run_stopped(tmp_path: Path, stopped: int) -> None:
    from tests.distributed import layouts

    before = layouts.TIMEOUT_S
    layouts.TIMEOUT_S = 25
    try:
        run_ranks(work_and_write, WORLD, str(tmp_path), stopped, "stop")
    finally:
        layouts.TIMEOUT_S = before


def work_and_write(rank: int, world_size: int, logs: str, hang_rank: int, how: str) -> None:
    said = work(rank, world_size, logs, hang_rank, how)
    if said:
        Path(logs, f"said-{rank}.txt").write_text(f"{said[0]:.2f} {said[1]}")


def test_long_phases_and_first_steps_are_no_hangs(tmp_path):
    assert run_ranks(no_hang, 2, str(tmp_path)) == [[], []]
