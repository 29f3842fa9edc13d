"""The order is a function: of the seed, the slices and the weights, and of nothing else."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from llm.data.order import CorpusPlan, Cursor, hold_out, permuted, plan_corpus
from llm.data.slices import SourceFile, SourceSlices, plan_slices
from llm.state import COUNTED, TrainState
from tests.stream_reference import Case, check, made_up_rows, product, random_case


def source(name: str, count: int) -> SourceSlices:
    return plan_slices(name, [SourceFile(name, f"/{name}", f"/{name}", 100 * count, "1", "text")], 100)


def plan(counts: dict[str, int], weights: dict[str, float] | None = None, held: int = 0, **keys) -> CorpusPlan:
    sources = [source(name, count) for name, count in counts.items()]
    settings = {"window_slices": 4, "seed": 0, **keys}
    return plan_corpus(sources, weights or dict.fromkeys(counts), held_out=dict.fromkeys(counts, held), **settings)


def names(plan: CorpusPlan, windows: range) -> list[tuple[str, int]]:
    return [(s.source, s.start) for w in windows for s in plan.window(0, w)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 9, 255, 1000])
def test_permuted_is_a_permutation(size):
    assert sorted(permuted(i, size, (0, "key")) for i in range(size)) == list(range(size))


def test_permutations_of_different_keys_differ():
    one, other = ([permuted(i, 100, (seed, "key")) for i in range(100)] for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize("held", [0, 3])
def test_an_epoch_without_weights_takes_every_slice_once(held):
    made = plan({"a": 13, "b": 9}, held=held, seed=3)
    training = {(s.name, s[i].start) for s in made.sources for i in range(len(s))}
    training -= {(s.source, s.start) for i in range(2) for s in made.held_out_slices(i)}
    assert len(training) == 22 - 2 * held
    orders = []
    for epoch in range(3):
        seen = [(s.source, s.start) for w in range(made.windows_per_epoch) for s in made.window(epoch, w)]
        assert sorted(seen) == sorted(training)
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]


def test_weights_are_exact_in_every_block_and_passes_over_a_source_are_whole():
    made = plan({"a": 40, "b": 10}, {"a": 0.75, "b": 0.25})
    assert made.stages[0].slots == (192, 64)
    taken: dict[str, list[int]] = {"a": [], "b": []}
    for block in range(5):
        here = names(made, range(block * made.windows_per_block, (block + 1) * made.windows_per_block))
        assert Counter(name for name, _ in here) == {"a": 192, "b": 64}
        for name, start in here:
            taken[name].append(start)
    # Slots of a block are shuffled, but what a source gives to whole blocks is whole passes and a rest.
    assert Counter(taken["a"]).total() == 960 and set(Counter(taken["a"]).values()) == {24}
    assert set(Counter(taken["b"]).values()) == {32}


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": 1.0, "b": 1e-9}, {"a": 1000.0, "b": 1.0}, {"a": 3.0, "b": 1.0}])
def test_slots_follow_weights_and_every_source_has_one(weights):
    slots = plan({"a": 50, "b": 50}, weights).stages[0].slots
    share = weights["b"] / sum(weights.values())
    assert min(slots) >= 1
    assert slots[1] / sum(slots) == pytest.approx(share, rel=0.15, abs=1e-4)


def test_a_weight_is_a_share_of_bytes_whatever_the_slices():
    sources = [source("a", 50), plan_slices("b", [SourceFile("b", "/b", "/b", 400 * 50, "1", "text")], 400)]
    made = plan_corpus(sources, {"a": 0.5, "b": 0.5}, held_out={"a": 0, "b": 0}, window_slices=4, seed=0)
    assert made.stages[0].slots[0] == pytest.approx(4 * made.stages[0].slots[1], rel=0.05)


def test_a_window_does_not_depend_on_what_was_asked_before():
    made = plan({"a": 40}, window_slices=3, seed=9)
    asked = [(e, i) for e in range(3) for i in range(made.windows_per_epoch)]
    in_order = {key: made.window(*key) for key in asked}
    random.Random(0).shuffle(asked)
    assert all(made.window(*key) == in_order[key] for key in asked)


def test_windows_follow_one_another_over_the_epoch_edge():
    made = plan({"a": 12})
    assert made.windows_per_epoch == 3
    assert [made.nth_window(Cursor(1, 2, 5), n) for n in range(4)] == [(1, 2), (2, 0), (2, 1), (2, 2)]


def test_at_most_half_of_a_source_is_held_out():
    assert hold_out(source("a", 20), 250) == 3
    assert hold_out(source("a", 8), 10**9) == 4
    assert hold_out(source("a", 8), 0) == 0


def test_seeking_in_a_thousand_million_slices_takes_no_time_and_the_state_is_small():
    began_s = time.perf_counter()
    files = [SourceFile("a", f"/{i}", f"/{i}", 100 * 10**6, "1", "text") for i in range(1000)]
    big = plan_slices("a", files, 100)
    assert len(big) == 10**9
    made = plan_corpus([big], {"a": None}, held_out={"a": 1000}, window_slices=4, seed=0)
    cursor = Cursor(7, made.windows_per_epoch // 2, 3)
    window = made.window(*made.nth_window(cursor, 0))
    assert time.perf_counter() - began_s < 1
    assert len(window) in (3, 4) and window != made.window(*made.nth_window(cursor, 1))
    far = Cursor(7, 10**9, 10**6, tuple(range(10**6, 10**6 + 20)))
    state = TrainState(10**6, 10**13, far, counts=Counter(dict.fromkeys(COUNTED, 10**14)))
    assert len(json.dumps(state.to_json())) < 1024


def test_the_state_survives_json():
    state = TrainState(3, 99, Cursor(1, 2, 3, (4, 5)), "ab" * 16, Counter(records=3))
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_stage_begins_with_the_first_block_that_was_not_begun():
    made = plan({"a": 300, "b": 300}, {"a": 1.0, "b": 1.0}, schedule=[(10, {"b": 1.0})])
    per_block = made.windows_per_block
    here = made.schedule.at_step(Cursor(0, 5, 1), 9)
    assert here.began == ()
    there = made.schedule.at_step(Cursor(0, 5, 1), 10)
    assert there.began == (1,)
    assert {s.source for s in made.window(0, per_block - 1, there.began)} == {"a", "b"}
    assert {s.source for w in range(per_block, 2 * per_block) for s in made.window(0, w, there.began)} == {"b"}
    assert made.schedule.at_step(Cursor(0, per_block, 0), 10).began == (1,)
    # Nothing of b twice: the second stage goes on in b's pass where the first left it.
    seen = [s.start for w in range(2 * per_block) for s in made.window(0, w, there.began) if s.source == "b"]
    assert max(Counter(seen).values()) == 2 and Counter(seen).total() == 128 + 256


@pytest.mark.parametrize("seed", range(60))
def test_every_batch_equals_the_slow_reference(seed):
    """A sample; `make faults` goes through 10,000."""
    check(random_case(random.Random(seed)))


def test_an_epoch_loses_nothing_and_gives_nothing_twice():
    case = Case((17, 9), (2, 0), (None, None), (), 3, 5, 6, (), "auto", 3, 2, 4, 0)
    made = case.plan()
    rows = sum(len(made_up_rows(s[i])) for s in made.sources for i in range(len(s)))
    rows -= sum(len(made_up_rows(piece)) for piece in made.held_out_slices(0))
    batches = [batch for batch, _ in islice(product(case, made, Cursor(), 0, 3), -(-2 * rows // 6))]
    stream = [tuple(row) for row in np.concatenate(batches).tolist()]
    assert len(set(stream[:rows])) == rows
    assert set(stream[rows : 2 * rows]) == set(stream[:rows])
