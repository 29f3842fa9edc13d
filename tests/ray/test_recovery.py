"""A run whose workers are killed recovers by itself, through Ray, and ends as the undisturbed one did, to the bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llm.metrics import read_rows, rows_of
from tests.kills import Watched, checkpoints, finish, ledger
from tests.small_run import start_run

SETTINGS = (
    "train.steps=400",
    "checkpoint.every_steps=10",
    "checkpoint.keep=1000",
    "eval.rows=0",
    "export.enabled=false",
    "parallel.workers=2",
)


def kill_campaign(recipe: Path, settings: tuple[str, ...], kills: int, seed: int) -> None:
    """Kills random workers at random moments, every second one while a checkpoint is written; every checkpoint must be the undisturbed
    run's."""
    finish(start_run(recipe, *settings, "run.name=whole"))
    chance = random.Random(seed)
    run = Watched(start_run(recipe, *settings, "run.name=killed", "recovery.max_crashes=1000"), recipe.parent / "runs" / "killed")
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


def test_a_killed_worker_restarts_and_the_run_ends_the_same(recipe):
    kill_campaign(recipe, SETTINGS, kills=2, seed=1)


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_twenty_kills_through_ray_leave_every_checkpoint_bit_identical(recipe):
    kill_campaign(recipe, (*SETTINGS, "train.steps=2000", "checkpoint.every_steps=20"), kills=20, seed=20)
