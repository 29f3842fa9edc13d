from __future__ import annotations

import itertools
import random

import pytest

from llm.config_train import TrainSection
from llm.parallel.mesh import Mesh
from llm.train.schedule import lr_factor


def section(**changes) -> TrainSection:
    return TrainSection(**{"steps": 100, "batch_rows": 1, "lr": 1.0, "warmup_steps": 10, "min_lr_frac": 0.1, **changes})


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    train = section(schedule=schedule)
    assert [lr_factor(train, s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear"])
def test_the_last_step_has_the_least_rate_and_the_fall_is_monotonic(schedule):
    train = section(schedule=schedule)
    factors = [lr_factor(train, s) for s in range(10, 100)]
    assert factors[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors))


def test_wsd_stays_at_the_peak_until_the_decay():
    train = section(schedule="wsd", decay_frac=0.2)
    assert all(lr_factor(train, s) == 1.0 for s in range(9, 80))
    assert lr_factor(train, 80) < 1.0


def test_constant_never_falls():
    assert lr_factor(section(schedule="constant"), 99) == 1.0


def test_no_warm_up_begins_at_the_peak():
    assert lr_factor(section(schedule="wsd", warmup_steps=0), 0) == 1.0


def test_warm_up_may_be_a_fraction_of_the_steps():
    train = section(warmup_steps=0, warmup_frac=0.2)
    assert [lr_factor(train, s) for s in (0, 9, 19)] == pytest.approx([0.05, 0.5, 1.0])
    assert [lr_factor(train, s) for s in range(100)] == [lr_factor(section(warmup_steps=20), s) for s in range(100)]


BATCHES = {"batch_rows": 8, "batch_schedule": [{"from_step": 30, "rows": 32}, {"from_step": 60, "rows": 128}]}


@pytest.mark.parametrize(
    ("rule", "factors"), [("none", [1.0, 1.0, 1.0, 1.0]), ("sqrt", [0.5, 0.5, 1.0, 2.0]), ("linear", [0.25, 0.25, 1.0, 4.0])]
)
def test_the_rate_follows_the_batch_of_each_stage_by_the_rule(rule, factors):
    train = section(schedule="constant", warmup_steps=0, lr_batch_rule=rule, lr_batch_rows=32, **BATCHES)
    assert [lr_factor(train, step) for step in (0, 29, 30, 60)] == factors


def test_the_batch_is_a_factor_on_top_of_the_schedule():
    plain, ruled = section(**BATCHES), section(lr_batch_rule="sqrt", lr_batch_rows=2, **BATCHES)
    for step in range(100):
        assert lr_factor(ruled, step) == pytest.approx(lr_factor(plain, step) * (plain.rows_at(step) / 2) ** 0.5)


@pytest.mark.parametrize("seed", range(30))
def test_a_budget_of_tokens_is_the_fewest_steps_that_see_them(seed):
    rng = random.Random(seed)
    begins = sorted(rng.sample(range(1, 40), rng.randint(0, 4)))
    stages = [{"from_step": step, "rows": rng.randint(1, 40)} for step in begins]
    train, seq_len = section(batch_rows=rng.randint(1, 40), batch_schedule=stages), rng.randint(2, 50)
    for tokens in [1, *rng.choices(range(1, 50_000), k=20)]:
        steps = train.steps_for(tokens, seq_len)
        assert sum(map(train.rows_at, range(steps - 1))) * seq_len < tokens <= sum(map(train.rows_at, range(steps))) * seq_len


def test_tensor_groups_are_adjacent_ranks():
    meshes = [Mesh(rank, 6, 2) for rank in range(6)]
    assert [(m.data_rank, m.tensor_rank) for m in meshes] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert list(meshes[3].tensor_group) == [2, 3]
    assert meshes[0].data_size == 3
