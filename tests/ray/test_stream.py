"""The stream through real Ray Data: step s is the reference's rows, whatever the data size, wherever it begins, and whatever dies."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cluster.connect import connected
from llm.config import S3Section
from llm.config_file import load_run
from llm.data.order import Cursor
from llm.data.slices import Slice
from llm.data.window import Packed, Recipe, make_slice, make_window
from llm.train.prepare import prepare

STEPS, BATCH_ROWS, TENSOR = 83, 8, 2  # more batches than a group holds, and no multiple of it


@pytest.fixture(scope="module")
def local_ray():
    with connected(3):
        yield


@pytest.fixture
def stream_recipe(recipe: Path) -> Recipe:
    # Small windows of unequal length, so that steps reach over their edges.
    return prepare(load_run(str(recipe), ["data.slice_bytes=4096", "data.window_slices=1", "eval.rows=0"]), "/none", 0.0).recipe


@dataclass(frozen=True)
class Unsteady:
    """Stands in for the token cache: slices take random times, and the process that makes one dies now and then, once a slice."""

    folder: Path
    seed: int
    deaths: int

    def slice(self, recipe: Recipe, piece: Slice) -> Packed:
        rng = random.Random(f"{self.seed} {piece.start} {piece.stripe}")
        time.sleep(rng.random() * 0.2)
        mark = self.folder / f"died-{piece.start}-{piece.stripe}"
        if rng.random() < 0.7 and not mark.exists() and len(list(self.folder.glob("died-*"))) < self.deaths:
            mark.touch()
            os._exit(1)
        return make_slice(recipe, piece)


def reference(recipe: Recipe, cursor: Cursor, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, positions) of the next rows, made one window after the other without Ray."""
    ids, positions, number = [], [], 0
    while sum(map(len, ids)) < num_rows:
        epoch, window = recipe.plan.nth_window(cursor, number)
        made = make_window(recipe, epoch, window).rows.ids
        skip = cursor.offset if number == 0 else 0
        ids.append(made[skip:])
        positions += [(epoch, window, offset) for offset in range(skip, len(made))]
        number += 1
    assert number >= 3, "the test wants steps that reach over window edges"
    return np.concatenate(ids)[:num_rows], np.array(positions[:num_rows])


def batches_through_ray(recipe: Recipe, cursor: Cursor, data_size: int, folder: Path, cache=None) -> list[list[dict[str, np.ndarray]]]:
    """Each step's blocks, by data rank."""
    from llm.data.split import OneSplitPerDataRank
    from llm.data.start_file import StartFile
    from llm.data.stream import Quarantine, sequences

    rank_rows = BATCH_ROWS // data_size
    start = StartFile(str(folder / "start.json"), S3Section())
    start.write(cursor)
    dataset = sequences(
        recipe,
        start,
        num_rows=STEPS * BATCH_ROWS,
        batch_sizes=[BATCH_ROWS],
        data_size=data_size,
        windows_ahead=2,
        quarantine=Quarantine(str(folder / "quarantine"), S3Section()),
        cache=cache,
    )
    shards = OneSplitPerDataRank(TENSOR).configure({"train": dataset}, data_size * TENSOR, None, None)
    readers = [shard["train"] for shard in shards]
    assert all(reader is None for rank, reader in enumerate(readers) if rank % TENSOR), "tensor peers were given a stream"

    def first_blocks(reader) -> list[dict[str, np.ndarray]]:
        blocks = reader.iter_batches(batch_size=rank_rows, batch_format="numpy", prefetch_batches=2, drop_last=False)
        return [block for block, _ in zip(blocks, range(STEPS), strict=False)]

    with ThreadPoolExecutor(data_size) as pool:
        by_rank = list(pool.map(first_blocks, readers[::TENSOR]))
    return [list(blocks) for blocks in zip(*by_rank, strict=True)]


def check(recipe: Recipe, cursor: Cursor, data_size: int, folder: Path, cache=None) -> None:
    ids, positions = reference(recipe, cursor, STEPS * BATCH_ROWS)
    steps = batches_through_ray(recipe, cursor, data_size, folder, cache)
    assert len(steps) == STEPS
    for number, blocks in enumerate(steps):
        rows = slice(number * BATCH_ROWS, (number + 1) * BATCH_ROWS)
        assert [len(block["ids"]) for block in blocks] == [BATCH_ROWS // data_size] * data_size
        np.testing.assert_array_equal(np.concatenate([block["ids"] for block in blocks]), ids[rows])
        np.testing.assert_array_equal(np.concatenate([block["position"] for block in blocks]), positions[rows])


@pytest.mark.parametrize("begin", [None, 37])
def test_a_batch_is_the_same_rows_for_every_data_size(stream_recipe, local_ray, tmp_path, begin):
    cursor = Cursor()
    if begin is not None:
        _, positions = reference(stream_recipe, cursor, STEPS * BATCH_ROWS)
        epoch, window, offset = (int(x) for x in positions[begin])
        cursor = Cursor(epoch, window, offset)
    for data_size in (1, 2, 4):
        check(stream_recipe, cursor, data_size, tmp_path)


def test_late_tasks_and_dead_ones_change_nothing(stream_recipe, local_ray, tmp_path):
    check(stream_recipe, Cursor(), 2, tmp_path, Unsteady(tmp_path, 2, deaths=3))  # with this seed each window that is needed has a death
    assert list(tmp_path.glob("died-*")), "no task died: the test shows nothing"


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_late_tasks_and_dead_ones_change_nothing_20_times_of_20(stream_recipe, local_ray, tmp_path):
    deaths = 0
    for seed in range(20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        check(stream_recipe, Cursor(0, seed % 3, seed), (1, 2, 4)[seed % 3], folder, Unsteady(folder, seed, deaths=4))
        deaths += len(list(folder.glob("died-*")))
    assert deaths >= 20
