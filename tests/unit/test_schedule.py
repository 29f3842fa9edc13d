from __future__ import annotations

import itertools

import pytest

from llm.config import TrainSection
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


def test_tensor_groups_are_adjacent_ranks():
    meshes = [Mesh(rank, 6, 2) for rank in range(6)]
    assert [(m.data_rank, m.tensor_rank) for m in meshes] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert list(meshes[3].tensor_group) == [2, 3]
    assert meshes[0].data_size == 3
