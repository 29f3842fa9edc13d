"""Population-based training without Ray: who takes over from whom, with what, and that a sweep that goes on decides the same."""

from __future__ import annotations

import random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm.search.population import FACTOR, boundaries, takeovers
from llm.search.searchers import searcher_of
from llm.search.space import parse_space
from llm.search.study import Study
from llm.search.sweep_config import load_sweep
from llm.search.trials import FAILED, FINISHED, PAUSED, Point, Trial, best_of
from tests.search.sweeps import write_sweep

SPACE = parse_space({"train.lr": {"loguniform": [1e-4, 1.0]}, "parallel.zero_stage": {"choice": [0, 1, 3]}})


def member(number: int, loss: float, **settings) -> Trial:
    return Trial(number, {"train.lr": 0.01, "parallel.zero_stage": 1, **settings}, curve=(Point(10, 100, loss),))


@given(st.lists(st.floats(0, 10), min_size=2, max_size=20), st.floats(0.05, 0.5), st.integers(0, 1000))
def test_the_worst_take_over_from_the_best(losses, quantile, seed):
    trials = [member(number, loss) for number, loss in enumerate(losses)]
    found = takeovers(trials, 10, quantile, SPACE, seed)
    assert found == takeovers(random.Random(seed).sample(trials, len(trials)), 10, quantile, SPACE, seed)
    count = max(1, int(len(trials) * quantile))
    ranked = sorted(losses)
    assert len(found) <= count and not {each.trial for each in found} & {each.of for each in found}
    for each in found:
        assert losses[each.of] < losses[each.trial]
        assert losses[each.of] <= ranked[count - 1] and losses[each.trial] >= ranked[-count]
        assert 1e-4 <= each.settings["train.lr"] <= 1.0 and each.settings["parallel.zero_stage"] in (0, 1, 3)
        assert each.run == f"{each.of:04d}" and each.step == 10


def test_settings_change_by_a_factor_or_are_drawn_anew():
    found = [takeovers([member(0, 1.0), member(1, 2.0)], 10, 0.5, SPACE, seed)[0].settings["train.lr"] for seed in range(400)]
    near = sum(lr in (0.012, pytest.approx(0.01 / FACTOR, rel=1e-3)) for lr in found)
    assert 250 < near < 350, "three in four"


def test_one_that_has_no_loss_takes_over_and_equals_do_not():
    assert [each.trial for each in takeovers([member(0, float("inf")), member(1, 2.0)], 10, 0.5, SPACE, 0)] == [0]
    assert takeovers([member(0, 2.0), member(1, 2.0)], 10, 0.5, SPACE, 0) == []
    assert takeovers([member(0, 2.0)], 10, 0.5, SPACE, 0) == []


def test_generations_end_at_multiples_of_their_length():
    assert boundaries(100, 40) == [40, 80] and boundaries(80, 40) == [40] and boundaries(40, 40) == []


def loss_at(study: Study, number: int, step: int) -> float:
    return study.configs[number].train.lr * 100 + 1 / step


def train(study: Study, stop_after: int = 10**9, order=lambda runs: runs) -> int:
    """Runs what the study asks for, as Tune would with any number of slots; returns how many runs began."""
    begun = 0
    while True:
        runs = []
        while (run := study.next()) is not None:
            runs.append(run)
        if not runs:
            assert not study.waits
            return begun
        for run in order(runs):
            if begun == stop_after:
                return begun
            begun += 1
            train = yaml.safe_load(run.yaml)["train"]
            until = train["until_step"] or train["steps"]
            study.learn(run.number, {"step": until, "tokens": until, "eval_loss": loss_at(study, run.number, until), "took_s": 1.0})
            if study.trials[run.number].takeovers and run.number == 5:
                study.end(run.number, FAILED, "out of memory")
            else:
                study.end(run.number, PAUSED if train["until_step"] else FINISHED)


def population(folder) -> Study:
    path = write_sweep(
        folder,
        space={"train.lr": {"loguniform": [1e-3, 1.0]}, "parallel.zero_stage": {"choice": [0, 1, 3]}},
        scheduler={"kind": "pbt", "first_frac": 0.25},
        set={"train.steps": 40, "eval.every_steps": 0},
        budget={"trials": 8},
    ) if not (folder / "sweep.yaml").exists() else folder / "sweep.yaml"  # fmt: skip
    sweep = load_sweep(str(path), [])
    return Study(sweep, searcher_of(sweep), ("true",), lambda study: None)


def test_generations_follow_one_another_and_the_best_is_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = population(tmp_path)
    assert train(study) == 8 * 4 - sum(4 - len(trial.curve) for trial in study.trials.values())
    taken = [each for trial in study.trials.values() for each in trial.takeovers]
    assert {each.step for each in taken} == {10, 20, 30} and len(taken) == 6
    heir = next(trial for trial in study.trials.values() if trial.takeovers and trial.status == FINISHED)
    last, config = heir.takeovers[-1], study.configs[heir.number]
    storage = f"{tmp_path}/runs/search/trials"
    assert config.checkpoint.start_from == f"{storage}/{last.run}/checkpoints/step-{last.step:08d}"
    assert config.run.name == f"{heir.number:04d}-{len(heir.takeovers)}" and config.train.lr == heir.settings["train.lr"]
    assert config.checkpoint.keep_every == 10 and config.eval.every_steps == 10
    best = best_of(study.trials)
    assert best is not None and "until_step: null" in study.sweep.best(study.configs[best.number])


@pytest.mark.parametrize("cut", [3, 8, 11, 17, 25])
def test_a_population_that_was_cut_decides_the_same(tmp_path, monkeypatch, cut):
    """Whatever had not ended is run again; real runs that have come to the end of the generation have nothing to do."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = population(tmp_path / "whole")
    train(whole)
    monkeypatch.chdir(tmp_path / "cut")
    train(population(tmp_path / "cut"), stop_after=cut)
    again = population(tmp_path / "cut")
    train(again, order=lambda runs: list(reversed(runs)))
    decided = [
        {number: (trial.settings, trial.takeovers, trial.status) for number, trial in study.trials.items()} for study in (whole, again)
    ]
    assert decided[0] == decided[1]
