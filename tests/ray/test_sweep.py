"""A sweep as its user runs it: every trial a real run through Ray Train, two at a time on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llm.metrics import read_rows, rows_of
from tests.kills import ledger
from tests.search.sweeps import start_sweep, write_sweep
from tests.small_run import start_run

PRETRAIN = (sys.executable, "-m", "jobs.pretrain", "--config")


def finish(process: subprocess.Popen[str], timeout_s: float) -> str:
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, f"{out[-3000:]}\n{err[-3000:]}"
    return out


@pytest.mark.parametrize("trials", [3, pytest.param(8, marks=[pytest.mark.faults, pytest.mark.timeout(2400)])])
def test_the_best_trial_is_a_run_that_anyone_can_repeat(tmp_path: Path, trials: int) -> None:
    space = {"train.lr": {"loguniform": [1e-4, 1e-1]}, "model.config.hidden_size": {"choice": [32, 64]}}
    settings = {"train.steps": 18, "parallel.workers": 2, "eval.every_steps": 0, "checkpoint.every_steps": 0}
    path = write_sweep(tmp_path, space=space, set=settings, budget={"trials": trials, "max_concurrent": 2})
    finish(start_sweep(path, command=PRETRAIN), 2000)
    folder = tmp_path / "runs" / "search"
    rows = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]
    ends = {row["trial"]: row for row in rows if row["kind"] == "end"}
    assert set(ends) == set(range(trials)) and {row["status"] for row in ends.values()} <= {"finished", "stopped"}

    best = yaml.safe_load((folder / "best.yaml").read_text())
    drawn = next(row["trial"] for row in rows if row["kind"] == "trial" and row["settings"]["train.lr"] == best["train"]["lr"])
    finish(start_run(folder / "best.yaml", f"run.storage={tmp_path}/alone"), 400)
    trial, alone = folder / "trials" / f"{drawn:04d}", tmp_path / "alone" / "search-best"
    assert ledger(trial) == ledger(alone) and len(ledger(trial)) == 18
    losses = [[row["loss"] for row in rows_of(read_rows(run / "metrics.jsonl"), "step")] for run in (trial, alone)]
    assert losses[0] == losses[1]
    assert len(list((tmp_path / "runs" / "cache" / "tokens").iterdir())) > 0, "the trials shared their tokens"


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_population_hands_real_checkpoints_on_to_other_layouts(tmp_path: Path) -> None:
    """The better trial trains at ZeRO 1, DP 2; the worse one takes over from it at ZeRO 3, TP 2, as anyone can repeat."""
    space = {"train.lr": {"grid": [1e-5, 3e-2]}, "parallel.zero_stage": {"choice": [1, 3]}, "parallel.tensor": {"choice": [1, 2]}}
    settings = {"train.steps": 12, "parallel.workers": 2, "eval.every_steps": 0, "checkpoint.every_steps": 0}
    scheduler = {"kind": "pbt", "first_frac": 0.5, "quantile_frac": 0.5}
    path = write_sweep(
        tmp_path,
        sweep={"name": "search", "seed": 9},
        space=space,
        set=settings,
        scheduler=scheduler,
        budget={"trials": 2, "max_concurrent": 1},
    )
    finish(start_sweep(path, command=PRETRAIN), 1500)
    folder = tmp_path / "runs" / "search"
    rows = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]
    generation = next(row for row in rows if row["kind"] == "generation")
    taken = generation["takeovers"][0]
    heir = folder / "trials" / f"{taken['trial']:04d}-1"
    assert (taken["trial"], taken["of"], generation["step"]) == (0, 1, 6)
    rows = read_rows(heir / "metrics.jsonl")
    assert [row["step"] for row in rows_of(rows, "step")] == list(range(7, 13))
    donor = rows_of(read_rows(folder / "trials" / "0001" / "metrics.jsonl"), "step")
    assert [row["ledger"] for row in rows_of(rows, "step")] == [row["ledger"] for row in donor[6:]], "all trials see the same data"
    config = yaml.safe_load((heir / "config.yaml").read_text())
    assert (config["parallel"]["zero_stage"], config["parallel"]["tensor"]) == (3, 2)
    there = json.loads((folder / "trials" / "0001" / "checkpoints" / "step-00000006" / "state.json").read_text())["layout"]
    assert (there["zero_stage"], there["tensor"]) == (1, 1)
    alone = tmp_path / "alone.yaml"
    alone.write_text(yaml.safe_dump({**config, "run": {**config["run"], "name": "alone", "storage": f"{tmp_path}/alone"}}))
    finish(start_run(alone), 400)
    again = rows_of(read_rows(tmp_path / "alone" / "alone" / "metrics.jsonl"), "step")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows_of(rows, "step")]
