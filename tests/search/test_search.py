"""The search in Ray Tune, with made-up runs that take a second: what is stopped, what fails, what a killed driver leaves."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.search.fake_run import loss_of
from tests.search.sweeps import start_sweep, write_sweep

AGENT = re.compile(r"ray::(RuntimeEnv|Dashboard)Agent")  # they notice after a minute that their cluster is gone


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / "search" / "sweep.jsonl").read_text().splitlines()]


def ends(folder: Path) -> dict[int, dict]:
    found = [row for row in rows(folder) if row["kind"] == "end"]
    assert len({row["trial"] for row in found}) == len(found), "a trial ends once"
    return {row["trial"]: row for row in found}


def finish(process, code: int = 0) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, err[-3000:]
    return out


def begun(folder: Path, trial: int) -> list[int]:
    """The steps at which a trial's run began."""
    return [int(line) for line in (folder / "runs" / "search" / "trials" / f"{trial:04d}" / "begun").read_text().splitlines()]


def test_asha_stops_the_worse_and_failed_trials_end_nothing(tmp_path):
    rates = [0.01, 0.5, 1e-4, 3e-4, 1.0, 0.02]
    path = write_sweep(tmp_path, space={"train.lr": {"grid": rates}}, search={"searcher": "grid"})
    out = finish(start_sweep(path, FAKE_STEP_S="0.1"))
    found = ends(tmp_path)
    assert set(found) == set(range(len(rates)))
    assert found[0]["status"] == "finished"
    assert found[1]["status"] == "failed" and "the loss is nan" in found[1]["cause"] and found[1]["cause"] in out
    assert {found[i]["status"] for i in (2, 3, 4)} == {"stopped"}
    best = yaml.safe_load((tmp_path / "runs" / "search" / "best.yaml").read_text())
    assert best["train"]["lr"] == 0.01 and best["run"]["name"] == "search-best"
    report = (tmp_path / "runs" / "search" / "report.html").read_text()
    assert report.count("data:image/png") >= 2 and "<script" not in report and "http" not in report.replace("http-equiv", "")
    assert f"{loss_of(0.01, 27):.4f}" in out


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.faults)])
def test_a_killed_driver_goes_on_and_does_no_trial_twice(tmp_path, kills):
    path, chance, slow = write_sweep(tmp_path), random.Random(kills), []
    for _ in range(kills):
        process = start_sweep(path, FAKE_STEP_S="0.15")
        known = len(rows(tmp_path)) if (tmp_path / "runs" / "search" / "sweep.jsonl").exists() else 0
        deadline = time.monotonic() + 120
        while not (tmp_path / "runs" / "search" / "sweep.jsonl").exists() or len(rows(tmp_path)) < min(known + 1, 12):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 3))
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        _, left = psutil.wait_procs(children, timeout=30)
        assert all(AGENT.search(" ".join(child.cmdline())) for child in left), [child.cmdline() for child in left]
        slow += left
    before = ends(tmp_path)
    finish(start_sweep(path))
    after = ends(tmp_path)
    assert set(after) == set(range(6)) and before.items() <= after.items()
    trials = {row["trial"]: row["settings"] for row in rows(tmp_path) if row["kind"] == "trial"}
    assert len(trials) == 6
    for trial in trials:
        steps = begun(tmp_path, trial)
        assert steps == sorted(steps) and steps.count(0) <= 1 + kills
    best = yaml.safe_load((tmp_path / "runs" / "search" / "best.yaml").read_text())
    finished = [trial for trial, row in after.items() if row["status"] == "finished"]
    assert best["train"]["lr"] == min((trials[trial]["train.lr"] for trial in finished), key=lambda lr: loss_of(lr, 27))
    counted = {trial: len(begun(tmp_path, trial)) for trial in trials}
    finish(start_sweep(path))  # all is done
    assert {trial: len(begun(tmp_path, trial)) for trial in trials} == counted, "what has ended is not trained again"
    assert not psutil.wait_procs(slow, timeout=120)[1]


def test_ctrl_c_leaves_nothing_running_and_more_budget_goes_on(tmp_path):
    path = write_sweep(tmp_path, scheduler={"kind": "none"}, budget={"trials": 2, "max_concurrent": 2})
    process = start_sweep(path, "eval.every_steps=3", FAKE_STEP_S="0.5")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("search/trials/0000/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on" in err, (out, err)
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left, [child.cmdline() for child in left]
    assert ends(tmp_path) == {}
    write = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**write, "budget": {"trials": 3, "max_concurrent": 3}}))
    finish(start_sweep(path, "eval.every_steps=3"))
    assert {row["status"] for row in ends(tmp_path).values()} == {"finished"} and len(ends(tmp_path)) == 3
    assert begun(tmp_path, 0)[-1] > 0, "it went on from where it was"


@pytest.mark.faults
def test_a_population_hands_checkpoints_on_also_over_a_killed_driver(tmp_path):
    sections = {
        "space": {"train.lr": {"loguniform": [1e-4, 0.3]}},
        "scheduler": {"kind": "pbt", "first_frac": 0.25, "quantile_frac": 0.34},
        "set": {"train.steps": 40, "eval.every_steps": 0},
        "budget": {"trials": 4, "max_concurrent": 2},
    }
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    finish(start_sweep(write_sweep(tmp_path / "whole", **sections)))
    path = write_sweep(tmp_path / "cut", **sections)
    process = start_sweep(path, FAKE_STEP_S="0.15")
    deadline = time.monotonic() + 180
    while not (tmp_path / "cut" / "runs" / "search" / "sweep.jsonl").exists() or not generations(tmp_path / "cut"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.1)
    time.sleep(1.0)  # within the second generation
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    out = finish(start_sweep(path))
    assert generations(tmp_path / "cut") == generations(tmp_path / "whole")
    assert [row["step"] for row in generations(tmp_path / "cut")] == [10, 20, 30]
    for row in generations(tmp_path / "cut"):
        assert len(row["takeovers"]) == 1
        for each in row["takeovers"]:
            heirs = sorted((tmp_path / "cut" / "runs" / "search" / "trials").glob(f"{each['trial']:04d}-*"))
            assert heirs and (heirs[-1] / "begun").read_text().split()[0] in ("10", "20", "30")
    best = [yaml.safe_load((tmp_path / name / "runs" / "search" / "best.yaml").read_text()) for name in ("whole", "cut")]
    assert best[0]["train"] == best[1]["train"] and best[0]["train"]["until_step"] is None
    assert {row["status"] for row in ends(tmp_path / "cut").values()} == {"finished"}
    assert "took over" in (tmp_path / "cut" / "runs" / "search" / "report.html").read_text() and "finished" in out


def generations(folder: Path) -> list[dict]:
    return [row for row in rows(folder) if row["kind"] == "generation"]


def test_the_budget_of_tokens_ends_a_sweep(tmp_path):
    path = write_sweep(tmp_path, scheduler={"kind": "none"}, budget={"trials": 50, "max_concurrent": 2, "tokens": 27 * 8 * 32 * 2.5})
    out = finish(start_sweep(path, "eval.every_steps=3"))
    assert "ended by budget.tokens=17280" in out
    assert 3 <= len([row for row in rows(tmp_path) if row["kind"] == "trial"]) <= 6


def test_another_space_is_another_sweep(tmp_path):
    path = write_sweep(tmp_path, budget={"trials": 1})
    finish(start_sweep(path))
    told = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**told, "space": {"train.lr": {"choice": [0.1]}}}))
    process = start_sweep(path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "was started otherwise" in err and "another sweep.name" in err
    assert "space.train.lr.choice.0: (absent) -> 0.1" in err and len(err.splitlines()) < 10
