"""A run whose workers are killed recovers by itself, through Ray, and ends as the undisturbed one did, to the bit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from llm.metrics import read_rows, rows_of
from llm.observe.goodput import goodput
from tests.kills import Watched, checkpoints, controllers, finish, ledger, train_workers
from tests.small_run import start_run

SETTINGS = (
    "train.steps=400",
    "checkpoint.every_steps=10",
    "checkpoint.keep=1000",
    "eval.rows=0",
    "export.enabled=false",
    "parallel.workers=2",
)

# Kills come faster than new steps, at times: the breaker would rightly stop the run.
PATIENT = ("recovery.max_crashes=1000", "recovery.max_without_progress=1000", "recovery.first_wait_s=0")


def kill_campaign(recipe: Path, settings: tuple[str, ...], kills: int, seed: int) -> None:
    """Kills random workers at random moments, every second one while a checkpoint is written; every checkpoint must be the undisturbed
    run's."""
    finish(start_run(recipe, *settings, "run.name=whole"))
    chance = random.Random(seed)
    run = Watched(start_run(recipe, *settings, "run.name=killed", *PATIENT), recipe.parent / "runs" / "killed")
    run.await_row("step", count=chance.randrange(3, 40))
    for number in range(kills):
        if number % 2:
            run.await_save()
        run.kill_one(chance)
        run.await_row("event", "restart")
        run.await_row("step", count=chance.randrange(1, 30))
    out = finish(run.process)
    whole = recipe.parent / "runs" / "whole"
    assert ledger(run.run) == ledger(whole)
    assert checkpoints(run.run) == checkpoints(whole)
    restarts = rows_of(read_rows(run.run / "metrics.jsonl"), "event", "restart")
    assert [row["number"] for row in restarts] == list(range(1, kills + 1))
    assert {row["cause"] for row in restarts} <= {"worker crash", "lost connection"}
    assert "restarted from step" in out
    spent = goodput(read_rows(run.run / "metrics.jsonl"))
    assert abs(spent.wall_s - sum(spent.parts_s.values())) <= 0.01 * spent.wall_s and spent.parts_s["other"] <= 0.01 * spent.wall_s, spent
    assert spent.parts_s["down time"] > kills and "goodput" in out


def test_a_killed_worker_restarts_and_the_run_ends_the_same(recipe):
    kill_campaign(recipe, SETTINGS, kills=2, seed=1)


@pytest.mark.faults
def test_a_killed_controller_is_followed_by_another_and_the_run_ends_the_same(recipe):
    """Of all processes the one that decides about restarts; a worker is killed before, so that the count of restarts has to go on."""
    settings = (*SETTINGS, "train.steps=120")
    finish(start_run(recipe, *settings, "run.name=whole"))
    run = Watched(start_run(recipe, *settings, "run.name=killed"), recipe.parent / "runs" / "killed")
    run.await_row("step", count=12)
    run.kill_one(random.Random(0))
    run.await_row("event", "restart")
    run.await_row("step", count=12)
    group = train_workers(run.process.pid)
    os.kill(controllers(run.process.pid)[0], signal.SIGKILL)
    restart = rows_of(run.await_row("event", "restart"), "event", "restart")[0]
    assert not any(psutil.pid_exists(worker) for worker in group)
    finish(run.process)
    assert restart["cause"] == "controller crash" and restart["number"] == 2 and restart["down_s"] > 1, restart
    assert ledger(run.run) == ledger(run.run.with_name("whole"))
    assert checkpoints(run.run) == checkpoints(run.run.with_name("whole"))
    spent = goodput(read_rows(run.run / "metrics.jsonl"))
    assert spent.parts_s["down time"] > restart["down_s"] and spent.parts_s["other"] <= 0.01 * spent.wall_s, spent


@pytest.mark.faults
def test_a_controller_that_dies_too_often_ends_the_run(recipe):
    run = Watched(start_run(recipe, *SETTINGS, "recovery.max_crashes=1"), recipe.parent / "runs" / "small")
    run.await_row("step", count=12)
    os.kill(controllers(run.process.pid)[0], signal.SIGKILL)
    run.await_row("event", "restart")
    run.await_row("step", count=3)
    os.kill(controllers(run.process.pid)[0], signal.SIGKILL)
    _, err = run.process.communicate(timeout=120)
    assert run.process.returncode == 1
    assert "controller crash" in err and "recovery.max_crashes=1 restarts in 24 hours are used up" in err and "Traceback" not in err, err


@pytest.mark.faults
def test_a_stopped_process_is_a_hang_that_is_named_and_survived(recipe):
    run = Watched(start_run(recipe, *SETTINGS, "train.steps=60"), recipe.parent / "runs" / "small")
    run.await_row("step", count=12)
    victim = train_workers(run.process.pid)[1]
    os.kill(victim, signal.SIGSTOP)
    stopped_at_s = time.time()
    restart = rows_of(run.await_row("event", "restart"), "event", "restart")[0]
    finish(run.process)
    assert restart["cause"] == "hang" and "does not answer" in restart["reason"], restart
    noticed_at_s = restart["written_at_s"] - restart["down_s"] + restart["noticed_s"]
    assert noticed_at_s - stopped_at_s < 12  # 10 s for the watchdog, the rest for the controller's next look
    assert not psutil.pid_exists(victim)
    assert list((run.run / "logs").glob("hang-rank-*.txt"))
    assert [step for step, _ in ledger(run.run)] == list(range(1, 61))


def test_sigterm_to_a_worker_saves_and_goes_on_at_no_cost(recipe):
    settings = (*SETTINGS, "train.steps=60", "checkpoint.every_steps=1000", "recovery.max_crashes=0")
    run = Watched(start_run(recipe, *settings), recipe.parent / "runs" / "small")
    run.await_row("step", count=12)
    os.kill(train_workers(run.process.pid)[0], signal.SIGTERM)
    rows = run.await_row("event", "restart")
    restart, saved = rows_of(rows, "event", "restart")[0], rows_of(rows, "event", "checkpoint")[-1]
    finish(run.process)
    assert restart["cause"] == "planned stop" and "SIGTERM" in restart["reason"]
    assert restart["step"] == saved["step"] >= 12 and restart["steps_redone"] == 0
    assert [step for step, _ in ledger(run.run)] == list(range(1, 61))


def test_a_killed_driver_is_resumed_by_the_same_command_while_its_orphans_write_no_more(recipe):
    run = Watched(start_run(recipe, *SETTINGS), recipe.parent / "runs" / "small")
    run.await_row("step", count=25)
    orphans = psutil.Process(run.process.pid).children(recursive=True)
    run.process.kill()
    run.process.communicate()
    second = start_run(recipe, *SETTINGS)  # the orphans' raylet needs seconds to notice, and they train meanwhile
    try:
        finish(second)
    finally:
        for process in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    steps = [step for step, _ in ledger(run.run)]
    assert steps == list(range(1, 401))
    assert rows_of(read_rows(run.run / "metrics.jsonl"), "event", "restart")[-1]["cause"] == "new command"
    assert [path.name for path in sorted((run.run / "lease").iterdir())] == ["00000001.json", "00000002.json"]


@pytest.mark.faults
def test_a_second_driver_of_a_living_run_is_refused_and_the_first_is_not_disturbed(recipe):
    run = Watched(start_run(recipe, *SETTINGS, "train.steps=60"), recipe.parent / "runs" / "small")
    run.await_row("step")
    second = start_run(recipe, *SETTINGS, "train.steps=60")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 4 and "another driver" in err and "Traceback" not in err
    finish(run.process)
    assert [step for step, _ in ledger(run.run)] == list(range(1, 61))


@pytest.mark.faults
def test_a_run_that_crashes_again_and_again_stops_with_its_causes(recipe):
    """A checkpoint folder that nobody can write to any more: what is done is lost each time."""
    settings = (*SETTINGS, "recovery.max_without_progress=1", "recovery.first_wait_s=0", "checkpoint.every_steps=1000")
    run = Watched(start_run(recipe, *settings), recipe.parent / "runs" / "small")
    run.await_row("step", count=30)
    for _ in range(2):
        run.kill_one(random.Random(0))
        if _ == 0:
            run.await_row("event", "restart")
            run.await_row("step", count=3)
    _, err = run.process.communicate(timeout=120)
    assert run.process.returncode == 1
    assert "was reached in 1 restarts" in err and err.count("worker crash") + err.count("lost connection") == 2


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_twenty_kills_through_ray_leave_every_checkpoint_bit_identical(recipe):
    kill_campaign(recipe, (*SETTINGS, "train.steps=1500", "checkpoint.every_steps=15"), kills=20, seed=20)
