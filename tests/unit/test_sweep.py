"""Sweep files, spaces, journals and what is read out of them, without Ray."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from statistics import median

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cluster.errors import ClusterError
from cluster.workers import concurrent_trials
from llm.config import S3Section
from llm.config_file import load_run
from llm.errors import ConfigError
from llm.observe.sweep_report import write_sweep_report
from llm.observe.sweep_table import SweepTable
from llm.search.importance import importance
from llm.search.searchers import searcher_of
from llm.search.space import parse_space
from llm.search.study import Study
from llm.search.sweep_config import load_sweep, yaml_value
from llm.search.trial import cause_of
from llm.search.trials import FAILED, FINISHED, PAUSED, STOPPED, Journal, Point, Trial, at_most_tokens, best_of, curve_of
from tests.search.sweeps import write_sweep

SPACE = {
    "train.lr": {"loguniform": [1e-4, 1e-1]},
    "train.min_lr_frac": {"uniform": [0, 0.5]},
    "train.batch_rows": {"quantized": [8, 64, 8]},
    "train.schedule": {"choice": ["wsd", "cosine"]},
    "parallel.zero_stage": {"grid": [0, 1, 3]},
}


@given(st.integers(0, 2**63 - 1), st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_draws_lie_in_the_space_and_follow_from_seed_and_number(seed, number):
    space = parse_space(SPACE)
    drawn = space.draw(seed, number)
    assert drawn == space.draw(seed, number) and list(drawn) == list(SPACE)
    assert 1e-4 <= drawn["train.lr"] <= 1e-1 and 0 <= drawn["train.min_lr_frac"] <= 0.5
    assert drawn["train.batch_rows"] in range(8, 65, 8) and drawn["train.schedule"] in ("wsd", "cosine")
    assert drawn["parallel.zero_stage"] == (0, 1, 3)[number % 3]
    for value in drawn.values():
        assert yaml.safe_load(yaml_value(value)) == value or math.isclose(float(yaml_value(value)), value)


def test_each_decade_of_a_loguniform_domain_is_as_likely():
    drawn = [parse_space(SPACE).draw(0, number)["train.lr"] for number in range(3000)]
    for low in (1e-4, 1e-3, 1e-2):
        assert 900 < sum(low <= lr < 10 * low for lr in drawn) < 1100


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"logunifrom": [1, 2]}, "Nearest: loguniform"),
        ({"loguniform": [0, 1]}, "must be above 0"),
        ({"uniform": [2, 1]}, "must be below"),
        ({"uniform": [1]}, "low and high"),
        ({"uniform": ["a", 2]}, "as numbers"),
        ({"quantized": [1, 10, 4]}, "whole steps"),
        ({"quantized": [1, 10, 0]}, "whole steps"),
        ({"choice": []}, "a list of values"),
        ({"choice": 3}, "a list of values"),
        ([1, 2], "write one of"),
        ({"choice": [1], "grid": [2]}, "write one of"),
    ],
)
def test_a_domain_that_is_none_is_refused_by_its_key(told, words):
    with pytest.raises(ConfigError, match=r"space\.train\.lr") as caught:
        parse_space({"train.lr": told})
    assert words in str(caught.value)


def test_all_bad_domains_are_told_at_once():
    with pytest.raises(ConfigError, match=r"(?s)space\.a: .*space\.b: "):
        parse_space({"a": 1, "b": {"uniform": [1]}})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"space": {"train.lrr": {"choice": [1e-3]}}}, "train.lr"),
        ({"space": {"trian.lr": {"choice": [1e-3]}}}, "train"),
        ({"space": {"train.lr": {"choice": [-1, "x"]}}}, "train.lr"),
        ({"space": {"train.lr": {"choice": [1e-3, -1]}}}, "space.train.lr: train.lr=-1 must be a number above 0"),
        ({"space": {"train.batch_rows": {"uniform": [8, 64]}}}, "Or draw whole numbers: {quantized: [low, high, step]}"),
        ({"space": {"parallel.zero_stage": {"quantized": [0, 4, 1]}}}, "parallel.zero_stage=4 must be one of 0, 1, 2, 3"),
        ({"space": {"run.seed": {"choice": [1, 2]}}}, "sweep.repeats"),
        ({"space": {"train.until_step": {"choice": [1, 2]}}}, "space.train.until_step: the scheduler says where trials pause"),
        ({"space": {"eval.rows": {"choice": [8, 16]}}}, "space.eval.rows: trials are compared by the loss on these rows"),
        ({"space": {"eval": {"choice": [{"rows": 8}]}}}, "space.eval: it holds eval.rows: trials are compared by the loss on these rows"),
        ({"space": {"data.cache": {"choice": [{}, {"enabld": True}]}}}, "space.data.cache: data.cache.enabld is not a known key. Nearest"),
        ({"space": {"data.sources.0": {"choice": [{"name": "made"}]}}}, "space.data.sources.0: data.sources.0.uri is missing"),
        ({"space": {"train.betas.0": {"choice": [0.9, "x"]}}}, 'space.train.betas.0: train.betas=["x", 0.95] must be a list of 2 numbers'),
        ({"space": {"train.betas.2": {"choice": [0.9]}}}, "space.train.betas.2: train.betas has no entry 2. Legal values: 0 to 1"),
        ({"space": {"data.cache.uri": {"choice": ["/a", "s3://me:word@b"]}}}, "space.data.cache.uri: data.cache.uri holds a user name or"),
        ({"space": {"data.cache.uri": {"choice": ["/a", ""]}}}, "data.cache.uri='' must be text of at least one character, or null"),
        (
            {"space": {"data.cache": {"choice": [{}]}, "data.cache.enabled": {"choice": [True]}}},
            "space.data.cache.enabled: it is a part of space.data.cache, whose values replace it. Vary one of the two",
        ),
        (
            {"space": {"model.config.hidden_size": {"uniform": [32, 128]}}},
            "must be a whole number of at least 1. Nearest legal value: 113. Or draw whole numbers: {quantized: [low, high, step]}",
        ),
        (
            {"space": {"train.batch_rows": {"choice": [8, 9]}, "train.microbatch_rows": {"choice": [5]}}},
            "space.train.microbatch_rows: train.batch_rows=8 cannot be split",
        ),
        (
            {"space": {"parallel.workers": {"choice": [4]}, "train.batch_rows": {"choice": [6, 10]}}},
            "of 100 draws none has values that go together: train.batch_rows=10 cannot be split over 4 data ranks",
        ),
        ({"set": {"data.seq_len": 5000}}, "no values that were drawn mend the run, which cannot be as it is: data.seq_len=5000 is longer"),
        ({"space": {"train.lr": {"quantized": [0, 1e300, 1e-300]}}}, "must lead from 0 to 1e+300 in 1 to 100,000 whole steps"),
        ({"budget": {"dollars": 3.0}}, "needs log.dollars_per_worker_hour"),
        ({"budget": {"trails": 3}}, "budget.trails: no such key. Nearest: trials."),
        ({"shedule": {}}, "shedule: no such key. Nearest: scheduler."),
        (
            {"space": {"model.config.hiden_size": {"choice": [64]}}},
            "hiden_size is no key of a llama model. Nearest legal name: hidden",
        ),
        ({"space": {"model.preset": {"choice": ["lama_1m"]}}}, "lama_1m"),
        ({"set": {"eval.rows": 0}}, "eval.rows=0"),
        ({"run": "nowhere.yaml"}, "nowhere.yaml"),
        ({"search": {"searcher": "grid"}}, "a grid search needs values that can be counted"),
        ({"scheduler": {"kind": "pbt"}, "space": {"train.batch_rows": {"choice": [8]}}}, "space.train.batch_rows"),
        ({"scheduler": {"kind": "pbt"}, "sweep": {"name": "s", "repeats": 2}}, "sweep.repeats=1"),
        ({"scheduler": {"kind": "pbt", "first_frac": 1.0}}, "leaves one generation"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_starts(tmp_path, sections, words):
    path = write_sweep(tmp_path, **sections)
    with pytest.raises(ConfigError) as caught:
        searcher_of(load_sweep(str(path), []))
    assert words in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "space",
    [
        {"parallel.workers": {"choice": [2, 4]}, "parallel.tensor": {"choice": [2]}},
        {"train.batch_rows": {"choice": [32, 64]}, "train.microbatch_rows": {"grid": [16, "auto"]}},
        {"train.lr_batch_rule": {"choice": ["sqrt", "linear"]}, "train.lr_batch_rows": {"choice": [8, 16]}},
    ],
)
def test_values_that_are_legal_only_together_are_searched(tmp_path, space):
    sweep = load_sweep(str(write_sweep(tmp_path, space=space)), [])
    sweep.trial(Trial(0, sweep.space.draw(0, 0)))


def test_a_space_may_vary_an_entry_of_a_list(tmp_path):
    space = {"train.betas.1": {"uniform": [0.8, 0.99]}, "data.sources.0.weight": {"uniform": [0.1, 1.0]}}
    trial = load_sweep(str(write_sweep(tmp_path, space=space)), []).trial(Trial(0, {"train.betas.1": 0.87, "data.sources.0.weight": 0.5}))
    assert trial.train.betas == (0.9, 0.87) and trial.data.sources[0].weight == 0.5


def test_the_cluster_is_for_the_largest_trial_however_its_numbers_are_written(tmp_path):
    space = {"parallel.workers": {"quantized": [1.0, 4.0, 1.0]}, "data.windows_ahead": {"choice": ["2", "3"]}}
    sweep = load_sweep(str(write_sweep(tmp_path, space=space)), [])
    assert (sweep.most("parallel", "workers"), sweep.most("data", "windows_ahead"), sweep.most("parallel", "tensor")) == (4, 3, 1)
    (tmp_path / "other").mkdir()
    sections = {"parallel": {"choice": [{"workers": 2}, {"workers": 3, "tensor": 1}]}}
    assert load_sweep(str(write_sweep(tmp_path / "other", space=sections)), []).most("parallel", "workers") == 3


def test_quantized_values_are_those_that_were_asked_for():
    space = parse_space({"a": {"quantized": [100001.0, 100003.0, 1.0]}, "b": {"quantized": [0.1, 0.4, 0.1]}, "c": {"quantized": [1, 3, 1]}})
    told = {key: domain.options() for key, domain in space.domains.items()}
    assert told == {"a": [100001.0, 100002.0, 100003.0], "b": [0.1, 0.2, 0.3, 0.4], "c": [1, 2, 3]}


def test_a_grid_of_more_combinations_than_memory_holds_is_gone_through_in_turn():
    space = parse_space({name: {"grid": list(range(1000))} for name in "abcdef"})
    assert [space.draw(0, number) for number in (0, 1001)] == [dict.fromkeys("abcdef", 0), {**dict.fromkeys("abcdef", 0), "e": 1, "f": 1}]
    assert space.in_grid(10**18 - 1) == dict.fromkeys("abcdef", 999) and space.in_grid(10**18) is None


def test_a_trial_is_the_run_with_its_settings_in_the_sweeps_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_sweep(tmp_path, space={"train.lr": {"choice": [0.5]}, "model.config.hidden_size": {"choice": [64]}})
    sweep = load_sweep(str(path), ["train.steps=100"])
    trial = sweep.trial(Trial(7, {"train.lr": 0.5, "model.config.hidden_size": 64}))
    assert trial.train.lr == 0.5 and trial.model.config["hidden_size"] == 64 and trial.train.steps == 100
    assert (trial.run.name, trial.run.storage) == ("0007", f"{tmp_path}/runs/search/trials")
    assert trial.data.cache.uri == f"{tmp_path}/runs/cache/tokens" == sweep.trial(Trial(8, {})).data.cache.uri
    assert trial.eval.every_steps == 12
    best = tmp_path / "best.yaml"
    best.write_text(sweep.best(trial))
    again = load_run(str(best))
    assert again.train == trial.train and again.model == trial.model and again.data.sources == trial.data.sources
    assert again.run.name == "search-best" and again.run.storage == "runs"


def test_a_trial_that_can_be_cut_has_a_checkpoint_to_go_on_from(tmp_path):
    path = write_sweep(tmp_path, scheduler={"kind": "none"}, set={"train.steps": 40, "eval.every_steps": 0, "checkpoint.every_steps": 0})
    trial = load_sweep(str(path), []).trial(Trial(0, {}))
    assert trial.eval.every_steps == trial.checkpoint.every_steps == 4
    trial = load_sweep(str(path), ["checkpoint.every_steps=100"]).trial(Trial(0, {}))
    assert trial.checkpoint.every_steps == 4, "no longer than a trial"
    trial = load_sweep(str(path), ["checkpoint.every_steps=3", "eval.every_steps=20"]).trial(Trial(0, {}))
    assert (trial.checkpoint.every_steps, trial.eval.every_steps) == (3, 20)


def test_a_run_is_no_sweep_and_a_sweep_no_run(tmp_path):
    path = write_sweep(tmp_path)
    with pytest.raises(ConfigError, match=r"sweep\.yaml is a sweep, not a run: use headrace sweep\. .* is 'run\.yaml'"):
        load_run(str(path))
    with pytest.raises(ConfigError, match=r"run\.yaml is a run, not a sweep: use headrace pretrain"):
        load_sweep(str(path.with_name("run.yaml")), [])


def test_set_does_not_reach_the_sweeps_own_sections(tmp_path):
    with pytest.raises(ConfigError, match=r"--set changes the run, and budget is the sweep's\. Change it in .*sweep\.yaml"):
        load_sweep(str(write_sweep(tmp_path)), ["budget.trials=0"])


def test_without_a_terminal_each_change_of_a_trial_is_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep, out = load_sweep(str(write_sweep(tmp_path, budget={"trials": 1})), []), io.StringIO()
    table = SweepTable("search", Console(file=out, width=240))
    study = Study(sweep, searcher_of(sweep), ("true",), table.show)
    for step, status in ((4, PAUSED), (10, PAUSED), (27, FINISHED)):
        assert study.next() is not None
        study.learn(0, {"step": step, "tokens": step * 256, "eval_loss": 3.0, "took_s": 1.0})
        study.end(0, status)
    assert study.next() is None
    lines = [line.partition("  ")[2] for line in out.getvalue().splitlines()]
    paused = ["paused, loss 3.0000 after 1,024 tokens", "paused, loss 3.0000 after 2,560 tokens"]
    going = [line.replace("paused", "goes on") for line in paused]
    assert lines == ["running", paused[0], going[0], paused[1], going[1], "finished, loss 3.0000 after 6,912 tokens"]


def test_what_a_setting_makes_wrong_is_told_without_lines_of_a_file_that_nobody_wrote(tmp_path):
    sweep = load_sweep(str(write_sweep(tmp_path, space={"train.batch_rows": {"choice": [8, 9]}}, set={"parallel.workers": 2})), [])
    with pytest.raises(ConfigError) as caught:
        sweep.trial(Trial(0, {"train.batch_rows": 9}))
    assert str(caught.value).splitlines()[0] == "trial 0 has 1 problem:"
    assert "train.batch_rows=9" in str(caught.value) and "--set" not in str(caught.value) and "(line" not in str(caught.value)


def test_losses_of_other_texts_are_marked_as_such(tmp_path):
    assert load_sweep(str(write_sweep(tmp_path)), []).remarks == []
    space = {"train.lr": {"choice": [1e-3]}, "data.seq_len": {"choice": [16, 32]}}
    (tmp_path / "other").mkdir()
    (remark,) = load_sweep(str(write_sweep(tmp_path / "other", space=space)), []).remarks
    assert "data.seq_len" in remark and "cannot be compared" in remark


def test_trials_of_other_batches_see_as_many_tokens(tmp_path):
    path = write_sweep(tmp_path, space={"train.batch_rows": {"choice": [8, 16]}}, set={"train.tokens": 27 * 8 * 32, "train.steps": None})
    sweep = load_sweep(str(path), [])
    runs = [sweep.trial(Trial(number, {"train.batch_rows": rows})) for number, rows in enumerate((8, 16))]
    assert [run.train.steps for run in runs] == [27, 14]
    again = tmp_path / "best.yaml"
    again.write_text(sweep.best(runs[1]))
    assert load_run(str(again)).train == runs[1].train


def journal(folder: Path, **made_of) -> Journal:
    return Journal(str(folder), S3Section(), made_of)


def test_a_journal_reads_back_and_refuses_another_sweep(tmp_path):
    first = journal(tmp_path, space={"train.lr": 1})
    first.begin(0, {"train.lr": 0.1}, 0)
    first.begin(1, {"train.lr": 0.2}, 1)
    first.learn(0, None, 1.2)
    first.end(0, FAILED, "it was\nbad")
    again = journal(tmp_path, space={"train.lr": 1})
    assert again.trials == first.trials and again.trials[0].cause == "it was\nbad" and again.trials[1].status == "running"
    with pytest.raises(ConfigError, match=r"was started otherwise:\n  space\.train\.lr: 1 -> 2\n  Set the values back"):
        journal(tmp_path, space={"train.lr": 2})
    with pytest.raises(ConfigError, match=r"\n  space\.9: 0 -> \(absent\)\n  and 3 more\n  Set"):
        (tmp_path / "sweep.jsonl").write_text(json.dumps({"made_of": {"space": {str(n): 0 for n in range(12)}}}) + "\n")
        journal(tmp_path, space={})
    (tmp_path / "sweep.jsonl").write_text('{"made_of": {"run": "train: {lr: 1}"}}\n')
    with pytest.raises(ConfigError, match=r"an earlier version's, which recorded its run as a text\. Choose another sweep\.name"):
        journal(tmp_path, run={"train": {"lr": 1}})
    for damaged in (b"\xff\n", b'{"made_of": 5}\n', b"[" * 100_000):
        (tmp_path / "sweep.jsonl").write_bytes(damaged)
        with pytest.raises(ConfigError, match="no sweep's record"):
            journal(tmp_path, space={})
    (tmp_path / "sweep.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="no sweep's record"):
        journal(tmp_path, space={"train.lr": 1})


def test_a_curve_takes_the_last_of_what_was_done_again(tmp_path):
    rows = [(0, 9.0), (3, 5.0), (6, 4.0), (6, 3.9), (9, 3.0)]
    data = b"".join(json.dumps({"kind": "eval", "step": step, "eval_loss": loss}).encode() + b"\n" for step, loss in rows)
    config = load_run(str(write_sweep(tmp_path).with_name("run.yaml")), ["train.batch_schedule=[{from_step: 6, rows: 16}]"])
    assert curve_of(data, config) == (Point(3, 3 * 8 * 32, 5.0), Point(6, 6 * 8 * 32, 3.9), Point(9, 12 * 8 * 32, 3.0))


def trial(number: int, loss: float, status: str = FINISHED, **settings) -> Trial:
    return Trial(number, settings or {"lr": number}, status=status, curve=(Point(1, 10, loss),))


def test_a_trial_that_has_not_ended_is_told_as_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(str(write_sweep(tmp_path, scheduler={"kind": "none"}, budget={"trials": 2, "tokens": 1000})), [])
    study = Study(sweep, searcher_of(sweep), ("true",), lambda study: None)
    assert study.next() is not None and study.status_of(study.trials[0]) == "running"
    study.learn(0, {"step": 5, "tokens": 1280, "eval_loss": 3.0, "took_s": 1.0})
    assert study.next() is None and study.cut == "budget.tokens=1000"
    assert study.status_of(study.trials[0]) == "cut by the budget"
    write_sweep_report(study)
    assert "cut by the budget" in (tmp_path / "runs" / "search" / "report.html").read_text()
    out = io.StringIO()
    SweepTable("search", Console(file=out, width=240)).conclude(study, study.trials[0], "best.yaml", "report.html")
    assert "after 1,280 tokens, cut by the budget: none came to its end" in out.getvalue()


def test_the_best_is_the_best_mean_of_those_that_finished():
    assert best_of({}) is None
    assert best_of({0: trial(0, 1.0, FAILED)}) is None
    found = best_of({0: trial(0, 2.0), 1: trial(1, 1.0, STOPPED), 2: trial(2, 3.0)})
    assert found is not None and found.number == 0
    seeds = [trial(0, 1.0, lr=1), trial(1, 4.0, lr=1), trial(2, 2.0, lr=2), trial(3, 2.2, lr=2)]
    found = best_of({each.number: each for each in seeds})
    assert found is not None and found.number == 2, "one lucky seed is not the best setting"


def test_importance_finds_the_key_that_matters():
    chance = random.Random(0)
    trials = []
    for number in range(60):
        lr, width = chance.uniform(-4, -1), chance.choice([32, 64])
        trials.append(trial(number, (lr + 2) ** 2 + 0.05 * chance.gauss(0, 1), lr=lr, width=width, noise=chance.random()))
    shares = importance(trials, ["lr", "width", "noise"])
    assert shares["lr"] > 0.7 and shares["width"] < 0.1 and shares["noise"] < 0.1
    assert importance(trials[:3], ["lr"]) == {}


def test_repeats_are_trials_of_other_seeds_and_a_bad_setting_fails_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = {"train.batch_rows": {"grid": [8, 9, 16]}, "parallel.workers": {"grid": [2]}}
    sweep = load_sweep(str(write_sweep(tmp_path, space=grid, search={"searcher": "grid"}, sweep={"name": "s", "repeats": 2})), [])
    study = Study(sweep, searcher_of(sweep), ("true",), lambda study: None)
    runs = []
    while (run := study.next()) is not None:
        runs.append(run)
    assert [run.number for run in runs] == [0, 1, 4, 5]
    assert [study.trials[n].status for n in range(6)] == ["running", "running", FAILED, FAILED, "running", "running"]
    assert "train.batch_rows=9" in study.trials[2].cause
    assert [study.configs[n].run.seed for n in (0, 1, 4, 5)] == [0, 1, 0, 1]
    again = Study(sweep, searcher_of(sweep), ("true",), lambda study: None)
    assert [run.number for run in iter(again.next, None)] == [0, 1, 4, 5] and again.trials == study.trials


@pytest.mark.parametrize("name", ["optuna", "bohb", "hyperopt"])
def test_searchers_that_learn_do_better_than_chance_and_follow_from_the_trials(tmp_path, name):
    space = {
        "train.lr": {"loguniform": [1e-6, 1.0]},
        "train.batch_rows": {"quantized": [8, 64, 8]},
        "train.schedule": {"choice": ["wsd", "cosine"]},
    }
    sweep = load_sweep(str(write_sweep(tmp_path, space=space, search={"searcher": name})), [])
    searcher, trials = searcher_of(sweep), []
    for number in range(60):
        told = searcher(number, trials)
        assert told is not None
        if number % 8 == 7:
            assert searcher_of(sweep)(number, trials) == told, "another command proposes the same"
        loss = abs(math.log10(told["train.lr"]) + 2) + (told["train.schedule"] == "wsd")
        status = FAILED if told["train.lr"] > 0.3 else STOPPED if loss > 3 else FINISHED
        points = [Point(step, 10 * step, loss + 1 / step) for step in ((1, 2, 3) if status == FINISHED else (1,))]
        trials.append(Trial(number, told, status=status, curve=() if status == FAILED else tuple(points)))
    assert len({json.dumps(dict(trial.settings)) for trial in trials}) > 40, "nothing is proposed anew"
    losses = [trial.loss for trial in trials[30:] if trial.curve]
    chance = [abs(random.Random(n).uniform(-6, 0) + 2) + n % 2 for n in range(999)]
    assert median(losses) < 0.8 * median(chance)


def test_bohb_learns_from_the_most_tokens_that_enough_trials_have_seen():
    curves = [(1.0,), (2.0, 1.5), (3.0, 2.5), (4.0, 3.5, 3.0)]
    trials = [
        Trial(number, {}, curve=tuple(Point(i + 1, 10 * (i + 1), loss) for i, loss in enumerate(losses)))
        for number, losses in enumerate(curves)
    ]
    assert at_most_tokens(trials, 3) == {1: 1.5, 2: 2.5, 3: 3.5}
    assert at_most_tokens(trials, 4) == {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}
    assert at_most_tokens(trials, 5) == {}


def test_a_searcher_that_is_not_installed_is_named(tmp_path, monkeypatch):
    sweep = load_sweep(str(write_sweep(tmp_path, search={"searcher": "optuna"})), [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install optuna"):
        searcher_of(sweep)


def test_what_a_process_died_of():
    assert cause_of(1, "noise\nerror: the loss is nan; lower\n  train.lr\n") == "the loss is nan; lower train.lr"
    assert cause_of(-9, "step 3\n") == "its process ended by signal SIGKILL: step 3"
    assert cause_of(3, "") == "its process ended by exit code 3"


def test_trials_at_once_follow_from_the_cluster():
    assert concurrent_trials(None, 4, 2, 17, 0) == 4 and concurrent_trials(3, 4, 2, 17, 0) == 3
    assert concurrent_trials(None, 4, 2, 100, 8) == 4, "the GPUs are fewer"
    with pytest.raises(ClusterError, match=r"a trial needs 4 logical CPUs.*the cluster has 3 CPUs"):
        concurrent_trials(None, 4, 2, 3, 0)
