"""A sweep of runs that really train, whose driver is killed five times, beside the same sweep undisturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from llm.metrics import read_rows, rows_of
from tests.search.sweeps import start_sweep, write_sweep

ALONE = (sys.executable, "-m", "tests.bench.sweep_trial")  # the product's loop, data and checkpoints in one process
WITH_RAY = (sys.executable, "-m", "jobs.pretrain", "--config")
TRIALS, STEPS, KILLS = 6, 45, 5


def sweep_in(folder: Path) -> Path:
    folder.mkdir()
    settings = {"train.steps": STEPS, "eval.every_steps": 0, "checkpoint.every_steps": 0, "export.enabled": False, "log.tensorboard": False}
    space = {"train.lr": {"loguniform": [1e-4, 1e-1]}, "model.config.hidden_size": {"choice": [32, 64]}}
    return write_sweep(folder, space=space, set=settings, budget={"trials": TRIALS, "max_concurrent": 2})


def finish(path: Path, command: tuple[str, ...]) -> str:
    process = start_sweep(path, command=command)
    out, err = process.communicate(timeout=2400)
    assert process.returncode == 0, f"{out[-2000:]}\n{err[-3000:]}"
    return out


def metric_rows(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("runs/search/trials/*/metrics.jsonl"))


def kill_at_a_random_moment(path: Path, command: tuple[str, ...], chance: random.Random) -> None:
    """Once the trials have written some more rows."""
    process, more = start_sweep(path, command=command), metric_rows(path.parent) + chance.randrange(1, 16)
    deadline = time.monotonic() + 600
    while metric_rows(path.parent) < more:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.02)
    below = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not psutil.wait_procs(below, timeout=120)[1], "what it had started ends with it"


@pytest.mark.faults
@pytest.mark.parametrize(
    "command", [pytest.param(ALONE, marks=pytest.mark.timeout(1800)), pytest.param(WITH_RAY, marks=pytest.mark.timeout(7200))]
)
def test_five_kills_change_neither_the_best_nor_any_trial(tmp_path: Path, command: tuple[str, ...]) -> None:
    whole, cut = sweep_in(tmp_path / "whole"), sweep_in(tmp_path / "cut")
    finish(whole, command)
    chance = random.Random(5)
    for _ in range(KILLS):
        kill_at_a_random_moment(cut, command, chance)
    journal = cut.parent / "runs" / "search" / "sweep.jsonl"
    before = journal.read_text()
    finish(cut, command)
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert journal.read_text().startswith(before), "what was known is still"
    for kind, key in (("trial", "trial"), ("end", "trial")):
        assert sorted(row[key] for row in rows if row["kind"] == kind) == list(range(TRIALS)), "once each"
    best = [yaml.safe_load((path.parent / "runs" / "search" / "best.yaml").read_text()) for path in (whole, cut)]
    assert best[0]["train"] == best[1]["train"] and best[0]["model"] == best[1]["model"]
    for number in range(TRIALS):
        runs = [path.parent / "runs" / "search" / "trials" / f"{number:04d}" for path in (whole, cut)]
        seen = [[(row["step"], row["ledger"], row["loss"]) for row in rows_of(read_rows(run / "metrics.jsonl"), "step")] for run in runs]
        steps = min(map(len, seen))  # which rungs it passes may depend on the order in which others came to theirs
        assert steps and seen[0][:steps] == seen[1][:steps]
