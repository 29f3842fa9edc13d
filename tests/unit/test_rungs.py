"""Successive halving without Ray: who goes on, whatever the order in which trials come in and wherever the driver is cut."""

from __future__ import annotations

import random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm.checkpoint.layout import step_folder
from llm.checkpoint.manifest import MANIFEST
from llm.search.rungs import promoted, rung_tokens
from llm.search.searchers import searcher_of
from llm.search.study import Study
from llm.search.sweep_config import load_sweep
from llm.search.trials import FAILED, FINISHED, PAUSED, STOPPED, Point, Trial, best_of
from tests.search.sweeps import write_sweep

ROW_TOKENS = 8 * 32  # of a step of the small run


def test_rungs_end_where_there_is_little_left_to_save():
    assert rung_tokens(1000, 0.1, 3) == [100, 300]
    assert rung_tokens(2700, 1 / 27, 3) == [100, 300, 900]
    assert rung_tokens(1000, 0.5, 3) == [500] and rung_tokens(1000, 0.6, 3) == []


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.floats(1.5, 5))
def test_the_best_one_in_so_many_goes_on(losses, reduction):
    trials = {n: Trial(n, {}, curve=(Point(1, 100, loss),)) for n, loss in enumerate(losses)}
    found = promoted(trials, 100, reduction, 0)
    assert len(found) == int(len(losses) / reduction)
    assert all(losses[a] <= losses[b] for a in found for b in set(trials) - set(found))
    assert promoted(trials, 101, reduction, 0) == [] and len(promoted(trials, 100, reduction, 1)) >= 1


def test_a_lucky_seed_does_not_go_on():
    losses = [5.0, 9.0, 6.0, 6.1, 8.0, 8.0, 8.0, 8.0]  # settings of two seeds: means of 7, 6.05, 8, 8
    trials = {n: Trial(n, {}, repeat=n % 2, curve=(Point(1, 100, loss),)) for n, loss in enumerate(losses)}
    assert promoted(trials, 100, 4, 0, repeats=2) == [2, 3]
    del trials[7]
    assert promoted(trials, 100, 3, 0, repeats=2) == [2, 3], "a setting of which a seed is missing is not judged yet"
    trials[3] = Trial(3, {}, repeat=1, status=FAILED)
    assert promoted(trials, 100, 3, 0, repeats=2) == [2], "of a setting of which a seed failed, the others are"


def test_the_seeds_of_a_setting_go_on_together():
    trials = {n: Trial(n, {}, repeat=n % 3, curve=(Point(1, 100, 5 + n / 10),)) for n in range(12)}
    assert promoted(trials, 100, 3, 0, repeats=3) == [0, 1, 2] and promoted(trials, 100, 2, 0, repeats=3) == [0, 1, 2, 3, 4, 5]


def study_of(folder, trials: int) -> Study:
    path = folder / "sweep.yaml"
    if not path.exists():
        scheduler = {"kind": "asha", "first_frac": 1 / 9, "reduction": 3}
        write_sweep(folder, set={"train.steps": 90, "eval.every_steps": 0}, scheduler=scheduler, budget={"trials": trials})
    sweep = load_sweep(str(path), [])
    return Study(sweep, searcher_of(sweep), ("true",), lambda study: None)


def loss_of(number: int, step: int) -> float:
    """Not the same order at every rung."""
    return 5 + random.Random(number).random() + 0.3 * random.Random(f"{number} {step}").random()


def train(study: Study, slots: int, order: random.Random, stop_after: int = 10**9) -> int:
    """Runs what the study asks for as Tune does, in any order; the steps that were trained."""
    running, trained, begun = [], 0, 0
    while True:
        while len(running) < slots and (run := study.next()) is not None:
            running.append(run)
            begun += 1
            if begun > stop_after:
                return trained
        if not running:
            assert not study.waits
            return trained
        run = running.pop(order.randrange(len(running)))
        config = yaml.safe_load(run.yaml)["train"]
        until, before = config["until_step"] or config["steps"], study.trials[run.number].tokens // ROW_TOKENS
        if run.ended:
            continue
        assert until > before, "a start for nothing"
        if run.number % 13 == 12:
            study.end(run.number, FAILED, "the loss is nan")
            continue
        trained += until - before
        study.learn(run.number, {"step": until, "tokens": until * ROW_TOKENS, "eval_loss": loss_of(run.number, until), "took_s": 1.0})
        study.end(run.number, PAUSED if config["until_step"] else FINISHED)


@pytest.mark.parametrize(("trials", "slots", "seed"), [(27, 1, 0), (27, 4, 1), (16, 2, 2), (8, 2, 3), (2, 2, 4), (1, 1, 5), (40, 40, 6)])
def test_at_least_those_of_successive_halving_go_on_in_any_order(tmp_path, monkeypatch, trials, slots, seed):
    monkeypatch.chdir(tmp_path)
    study = study_of(tmp_path, trials)
    train(study, slots, random.Random(seed))
    assert {trial.status for trial in study.trials.values()} <= {FINISHED, STOPPED, FAILED} and len(study.trials) == trials
    going = [number for number in study.trials if number % 13 != 12]
    for step in (10, 30):  # the rungs
        seen = [number for number in going if study.trials[number].curve[-1].step >= step]
        best = sorted(seen, key=lambda number: loss_of(number, step))[: max(1, len(seen) // 3)]
        assert all(study.trials[number].curve[-1].step > step for number in best)
    best = best_of(study.trials)
    assert best is not None and best.status == FINISHED


def test_one_slot_spends_what_successive_halving_does(tmp_path, monkeypatch):
    """And what the few cost that went on before better ones had come."""
    monkeypatch.chdir(tmp_path)
    study = study_of(tmp_path, 27)
    trained = train(study, 1, random.Random(0))
    exact = 25 * 10 + 8 * 20 + 2 * 60  # two of the 27 fail
    assert exact <= trained <= 1.4 * exact < 0.35 * 27 * 90


@pytest.mark.parametrize("cut", [1, 9, 20, 33, 38])
def test_a_search_that_was_cut_repeats_no_rung_and_finds_the_same_best(tmp_path, monkeypatch, cut):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = study_of(tmp_path / "whole", 27)
    train(whole, 1, random.Random(0))
    monkeypatch.chdir(tmp_path / "cut")
    first = study_of(tmp_path / "cut", 27)
    train(first, 1, random.Random(0), stop_after=cut)
    keep(first, tmp_path / "cut")
    again = study_of(tmp_path / "cut", 27)
    assert {number: trial.curve for number, trial in again.trials.items()} == {
        number: trial.curve for number, trial in first.trials.items()
    }
    train(again, 1, random.Random(0))
    assert {number: (trial.status, trial.curve) for number, trial in again.trials.items()} == {
        number: (trial.status, trial.curve) for number, trial in whole.trials.items()
    }


def keep(study: Study, folder) -> None:
    """What the runs of the trials have left: their metrics and checkpoints."""
    import json

    for trial in study.trials.values():
        run = folder / "runs" / "search" / "trials" / trial.run_name
        run.mkdir(parents=True)
        rows = [{"kind": "eval", "step": point.step, "eval_loss": point.loss} for point in trial.curve]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for point in trial.curve:
            saved = run / "checkpoints" / step_folder(point.step)
            saved.mkdir(parents=True)
            (saved / MANIFEST).write_text("{}")  # published


def test_no_trial_is_started_for_a_rung_that_its_batch_has_passed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small, large = 8, 320  # rows: rungs of 80 and 240 rows, one step of the large batch
    write_sweep(
        tmp_path,
        set={"train.tokens": 90 * ROW_TOKENS, "train.steps": None, "eval.every_steps": 0},
        space={"train.batch_rows": {"grid": [small, large, large]}, "train.lr": {"uniform": [0.1, 0.2]}},
        scheduler={"kind": "asha", "first_frac": 1 / 9, "reduction": 3},
        budget={"trials": 18},
    )
    study = study_of(tmp_path, 18)
    while (run := study.next()) is not None:
        config, before = yaml.safe_load(run.yaml)["train"], study.trials[run.number].curve
        until = config["until_step"] or config["steps"]
        assert until > (before[-1].step if before else 0)
        tokens = until * config["batch_rows"] * 32
        loss = 5 - (config["batch_rows"] == large) - run.number / 100
        study.learn(run.number, {"step": until, "tokens": tokens, "eval_loss": loss, "took_s": 1.0})
        study.end(run.number, PAUSED if config["until_step"] else FINISHED)
    ended = study.trials.values()
    assert {trial.status for trial in ended} == {FINISHED, STOPPED}
    best = best_of(study.trials)
    assert best is not None and best.settings["train.batch_rows"] == large and best.status == FINISHED


def test_a_large_batch_that_waits_at_an_earlier_rung_keeps_nobody_at_a_later_one(tmp_path, monkeypatch):
    """It has seen the tokens of all rungs in its first step, is second at the first rung and would be the best at the next."""
    monkeypatch.chdir(tmp_path)
    write_sweep(
        tmp_path,
        set={"train.tokens": 90 * ROW_TOKENS, "train.steps": None, "eval.every_steps": 0},
        space={"train.batch_rows": {"grid": [320, 8, 8]}, "train.lr": {"uniform": [0.1, 0.2]}},
        scheduler={"kind": "asha", "first_frac": 1 / 9, "reduction": 3},
        budget={"trials": 3},
    )
    study, losses = study_of(tmp_path, 3), {(0, 1): 5.5, (1, 10): 5.0, (2, 10): 7.0, (1, 30): 6.0, (1, 90): 4.0}
    while (run := study.next()) is not None:
        config = yaml.safe_load(run.yaml)["train"]
        until = config["until_step"] or config["steps"]
        tokens = until * config["batch_rows"] * 32
        study.learn(run.number, {"step": until, "tokens": tokens, "eval_loss": losses[run.number, until], "took_s": 1.0})
        study.end(run.number, PAUSED if config["until_step"] else FINISHED)
    assert [trial.status for trial in study.trials.values()] == [STOPPED, FINISHED, STOPPED]


def test_better_settings_that_come_in_between_do_not_part_the_seeds_of_one_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheduler = {"kind": "asha", "first_frac": 1 / 9, "reduction": 3}
    told = {"set": {"train.steps": 90, "eval.every_steps": 0}, "scheduler": scheduler, "budget": {"trials": 4}}
    write_sweep(tmp_path, sweep={"name": "search", "repeats": 2}, **told)
    study = study_of(tmp_path, 4)

    def pauses(number: int, loss: float) -> None:
        study.learn(number, {"step": 10, "tokens": 10 * ROW_TOKENS, "eval_loss": loss, "took_s": 1.0})
        study.end(number, PAUSED)

    begun = [study.next() for _ in range(8)]
    for number in range(6):
        pauses(number, 5 + number)
    first = study.next()
    pauses(6, 1.0)
    pauses(7, 1.0)
    second = study.next()
    assert None not in begun and first is not None and second is not None
    assert (first.number, second.number) == (0, 1)
