"""The order is a function: of the seed, the slices and the weights, and of nothing else."""

from __future__ import annotations

import random

import pytest

from llm.data.order import Cursor, Slice, hold_out, permuted, plan_corpus


def slices(source: str, count: int, size: int = 100) -> list[Slice]:
    return [Slice(source, (), i, i + 1, size) for i in range(count)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 9, 255, 1000])
def test_permuted_is_a_permutation(size):
    assert sorted(permuted(i, size, (0, "key")) for i in range(size)) == list(range(size))


def test_permutations_of_different_keys_differ():
    one, other = ([permuted(i, 100, (seed, "key")) for i in range(100)] for seed in (0, 1))
    assert one != other


def test_permuted_needs_no_list():
    assert 0 <= permuted(123_456_789, 10**9, (0, "key")) < 10**9


def test_an_epoch_without_weights_takes_every_slice_once():
    plan = plan_corpus({"a": slices("a", 13), "b": slices("b", 5)}, {"a": None, "b": None}, window_slices=4, seed=3)
    for epoch in range(3):
        seen = [s for i in range(plan.windows_per_epoch) for s in plan.window(epoch, i)]
        assert sorted((s.source, s.start) for s in seen) == sorted((s.source, s.start) for part in plan.slices for s in part)


def test_weights_are_exact_in_every_epoch_and_passes_over_a_source_are_whole():
    plan = plan_corpus({"a": slices("a", 6), "b": slices("b", 2)}, {"a": 0.5, "b": 0.5}, window_slices=4, seed=0)
    assert plan.slots == (4, 4)
    taken: dict[str, list[int]] = {"a": [], "b": []}
    for epoch in range(3):
        here = [s for i in range(plan.windows_per_epoch) for s in plan.window(epoch, i)]
        assert sum(s.source == "a" for s in here) == 4
        for s in here:
            taken[s.source].append(s.start)
    assert sorted(taken["a"]) == sorted([*range(6)] * 2)  # 12 slots: two whole passes over 6 slices
    assert sorted(taken["b"]) == sorted([*range(2)] * 6)


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": 1.0, "b": 1e-9}, {"a": 3.0, "b": 1.0}])
def test_every_source_has_a_slot_and_slots_follow_weights(weights):
    plan = plan_corpus({"a": slices("a", 50), "b": slices("b", 50)}, weights, window_slices=4, seed=0)
    share = weights["a"] / sum(weights.values())
    assert plan.slots[0] == pytest.approx(100 * share, abs=1)
    assert min(plan.slots) >= 1


def test_a_window_does_not_depend_on_what_was_asked_before():
    plan = plan_corpus({"a": slices("a", 40)}, {"a": None}, window_slices=3, seed=9)
    asked = [(e, i) for e in range(3) for i in range(plan.windows_per_epoch)]
    in_order = {key: plan.window(*key) for key in asked}
    random.Random(0).shuffle(asked)
    assert all(plan.window(*key) == in_order[key] for key in asked)


def test_windows_follow_one_another_over_the_epoch_edge():
    plan = plan_corpus({"a": slices("a", 10)}, {"a": None}, window_slices=4, seed=0)
    assert plan.windows_per_epoch == 3
    assert [plan.nth_window(Cursor(1, 2, 5), n) for n in range(4)] == [(1, 2), (2, 0), (2, 1), (2, 2)]


def test_held_out_slices_are_never_trained_on():
    training, held = hold_out(slices("a", 20), needed_bytes=250, seed=0, source="a")
    assert len(held) == 3
    assert len(training) == 17
    assert not {s.start for s in training} & {s.start for s in held}


def test_at_most_half_of_a_source_is_held_out():
    training, held = hold_out(slices("a", 8), needed_bytes=10**9, seed=0, source="a")
    assert (len(training), len(held)) == (4, 4)


def test_nothing_is_held_out_when_nothing_is_needed():
    training, held = hold_out(slices("a", 8), needed_bytes=0, seed=0, source="a")
    assert (len(training), len(held)) == (8, 0)
