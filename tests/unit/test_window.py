"""Records of windows that give no row are counted, whatever the groups of rows, and wherever the stream begins."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np

from llm.data.order import CorpusPlan, Cursor
from llm.data.pack import no_rows
from llm.data.slices import Slice
from llm.data.stream import _window_block
from llm.data.window import Packed, Provenance, Recipe, make_window, with_empty_windows
from llm.state import COUNTED
from tests.stream_reference import NOWHERE, SEQ_LEN, MadeUpSlices, random_case, recipe_of


class MostlyEmpty(MadeUpSlices):
    """Of the slices most have only bad records."""

    def slice(self, recipe: Recipe, piece: Slice) -> Packed:
        found = super().slice(recipe, piece)
        if random.Random(piece.start).random() < 0.3:
            return Packed(found.rows, found.documents, found.counts + Counter(records=1, bad=1), ())
        return Packed(no_rows(SEQ_LEN), Provenance(), Counter(records=7, bad=5, documents=2, dropped_short=2), ())


def blocks(recipe: Recipe, cursor: Cursor, num_rows: int, slices: MostlyEmpty) -> dict[str, np.ndarray]:
    """The first rows from the cursor on, as `sequences` gets them from its windows."""
    found: list[dict[str, Any]] = []
    number = 0
    while sum(len(block["ids"]) for block in found) < num_rows:
        found += _window_block(recipe, cursor, number, NOWHERE, slices)  # pyright: ignore[reportArgumentType]
        number += 1
    return {name: np.concatenate([block[name] for block in found])[:num_rows] for name in ("position", "counts")}


def through(plan: CorpusPlan, last: Cursor, slices: MostlyEmpty, recipe: Recipe) -> list[int]:
    """COUNTED of all windows up to the one of the last row, made one by one."""
    total: Counter[str] = Counter()
    for number in range(last.epoch * plan.windows_per_epoch + last.window + 1):
        total += make_window(recipe, *divmod(number, plan.windows_per_epoch), (), slices.slice).counts
    return [total[name] for name in COUNTED]


def missed_and_counted(seed: int) -> int:
    """Records of empty windows, after the check that they are counted: in up to three passes, each of which goes on where one stopped."""
    rng = random.Random(seed)
    plan = random_case(rng).plan()
    recipe, slices, cursor = recipe_of(plan), MostlyEmpty(), Cursor()
    counted = np.zeros(len(COUNTED), dtype=np.int64)
    missed = 0
    for _ in range(rng.randint(1, 3)):
        group_rows, num_groups = rng.randint(1, 9), rng.randint(1, 12)
        rows = blocks(recipe, cursor, group_rows * num_groups, slices)
        for at in range(0, group_rows * num_groups, group_rows):
            position, counts = rows["position"][at : at + group_rows], rows["counts"][at : at + group_rows]
            full = with_empty_windows(counts, position, plan.windows_per_epoch, lambda begun=(recipe, cursor): begun, slices.slice)
            missed += int((full - counts)[:, 0].sum())
            counted += full.sum(axis=0)
        epoch, window, offset = (int(x) for x in rows["position"][-1])
        cursor = Cursor(epoch, window, offset + 1)
    assert counted.tolist() == through(plan, cursor, slices, recipe)
    assert counted[0] == counted[1] + counted[2], "records = bad + documents"
    return missed


def test_all_records_are_counted_once() -> None:
    assert sum(missed_and_counted(seed) > 0 for seed in range(30)) > 10


def test_nothing_is_made_again_where_no_window_is_missing() -> None:
    position = np.array([(0, 4, 8), (0, 4, 9), (0, 5, 0), (0, 5, 1), (1, 0, 0), (1, 1, 0)])
    counts = np.ones((6, len(COUNTED)), dtype=np.int64)

    def begin() -> tuple[Recipe, Cursor]:
        raise AssertionError("it was asked for")

    assert with_empty_windows(counts, position, 6, begin) is counts
