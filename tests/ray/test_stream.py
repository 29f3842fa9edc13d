"""The stream through real Ray Data: step s is the reference's rows, whatever the data size and wherever it begins."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cluster.connect import connected
from llm.config_file import load_run
from llm.data.order import Cursor
from llm.data.window import Recipe, make_window
from llm.train.prepare import prepare

STEPS, BATCH_ROWS, TENSOR = 37, 8, 2  # more batches than a group holds, and no multiple of it


@pytest.fixture(scope="module")
def local_ray():
    with connected(2):
        yield


@pytest.fixture
def stream_recipe(recipe: Path) -> Recipe:
    # Small windows of unequal length, so that steps reach over their edges.
    return prepare(load_run(str(recipe), ["data.slice_bytes=4096", "data.window_slices=1", "eval.rows=0"]), "/none", 0.0).recipe


def reference(recipe: Recipe, cursor: Cursor, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, positions) of the next rows, made one window after the other without Ray."""
    ids, positions, number = [], [], 0
    while sum(map(len, ids)) < num_rows:
        epoch, window = recipe.plan.nth_window(cursor, number)
        made = make_window(recipe, epoch, window)[0].ids
        skip = cursor.offset if number == 0 else 0
        ids.append(made[skip:])
        positions += [(epoch, window, offset) for offset in range(skip, len(made))]
        number += 1
    assert number > 3, "the test wants steps that reach over window edges"
    return np.concatenate(ids)[:num_rows], np.array(positions[:num_rows])


def batches_through_ray(recipe: Recipe, cursor: Cursor, data_size: int, folder: Path) -> list[list[dict[str, np.ndarray]]]:
    """Each step's blocks, by data rank."""
    from llm.config import S3Section
    from llm.data.split import OneSplitPerDataRank
    from llm.data.stream import Quarantine, sequences

    rank_rows = BATCH_ROWS // data_size
    dataset = sequences(
        recipe,
        cursor,
        num_batches=STEPS,
        batch_rows=BATCH_ROWS,
        data_size=data_size,
        windows_ahead=1,
        quarantine=Quarantine(str(folder), S3Section()),
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


@pytest.mark.parametrize("begin", [None, 37])
def test_a_batch_is_the_same_rows_for_every_data_size(stream_recipe, local_ray, tmp_path, begin):
    cursor = Cursor()
    if begin is not None:
        _, positions = reference(stream_recipe, cursor, STEPS * BATCH_ROWS)
        cursor = Cursor(*(int(x) for x in positions[begin]))
    ids, positions = reference(stream_recipe, cursor, STEPS * BATCH_ROWS)
    for data_size in (1, 2, 4):
        steps = batches_through_ray(stream_recipe, cursor, data_size, tmp_path / "quarantine")
        assert len(steps) == STEPS
        for number, blocks in enumerate(steps):
            rows = slice(number * BATCH_ROWS, (number + 1) * BATCH_ROWS)
            assert [len(block["ids"]) for block in blocks] == [BATCH_ROWS // data_size] * data_size
            np.testing.assert_array_equal(np.concatenate([block["ids"] for block in blocks]), ids[rows])
            np.testing.assert_array_equal(np.concatenate([block["position"] for block in blocks]), positions[rows])
