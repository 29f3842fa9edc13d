"""The Ray Data pipeline: window numbers in, blocks of rows out, in order.

`sequences` makes one task per window run `make_window` and re-cuts the rows, across window edges, into groups of a few whole units. A
unit is a batch, or where batches change their size as many rows as divide all of them: so the stream need not know at which steps they do.
Each group is put in rank-major order and cut into one block for each data rank: its rows of these units, one unit after the other.
`llm/data/split.py` deals block j to data rank j mod data_size, and `llm/data/batches.py` takes as many units as make up a step's batch. So
batches of 4 rows are the rows 0 1 2 3, 4 5 6 7, ... from the cursor on, whatever the data size.

Example: units of 4 rows, data_size=2, groups of 2 units: rows 0 1 2 3 | 4 5 6 7 become the blocks 0 1 4 5 and 2 3 6 7.

Where a pass over the dataset begins is not part of it: its tasks read that in the run's `StartFile`, so the readers can begin anew wherever
they are, when a stage of the mixture begins or a pass is at its end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)

from llm.config import S3Section
from llm.data.cache import TokenCache
from llm.data.order import Cursor
from llm.data.pack import narrowest
from llm.data.run_ahead import RUN_AHEAD, RunAhead
from llm.data.start_file import StartFile
from llm.data.window import Packed, Recipe, make_window, with_empty_windows
from llm.errors import DataError
from llm.redact import scrubbed
from llm.state import COUNTED
from llm.storage import join, write_bytes

# Planning a task costs the driver about 0.1 ms. A run that needs more windows begins another pass after these.
MAX_WINDOWS = 2000

# Bytes of raw text that make a token, at most: a pessimistic bound (English is about 4, numbers 2, some scripts 8) that says
# how many windows to plan for. Windows that turn out not to be needed are never read.
MOST_BYTES_PER_TOKEN = 16

# A block costs Ray 5 to 10 ms, in the task that makes it and in the one process that deals all blocks: with one a step and data rank, that
# would be what limits small models. Large rows are not worth holding back for it.
MAX_UNITS_PER_GROUP = 512
GROUP_BYTES = 8 << 20
MIN_GROUPS = 8  # of a run, so that a short one does not wait until all of it is tokenized

FILLED = ("slices", "rows", "tokens", "records", "bad")

UNSAFE_RAY_DATA_SETTINGS = (
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
)


@dataclass(frozen=True)
class Quarantine:
    """Where unreadable records are noted, one file a window: `<run>/quarantine/epoch-0-window-12.jsonl`."""

    folder: str
    s3: S3Section

    def write(self, epoch: int, window: int, packed: Packed) -> None:
        if not packed.bad:
            return
        lines = [json.dumps({"uri": b.uri, "position": b.position, "reason": b.reason}) + "\n" for b in packed.bad]
        write_bytes(join(self.folder, f"epoch-{epoch}-window-{window}.jsonl"), "".join(lines).encode(), self.s3)


def sequences(
    recipe: Recipe,
    start: StartFile,
    *,
    num_rows: int,
    batch_sizes: Sequence[int],
    data_size: int,
    windows_ahead: int,
    quarantine: Quarantine,
    cache: TokenCache | None = None,
) -> ray.data.Dataset:
    """Rows of the global order from where `start` says on, about `num_rows` and at most those of MAX_WINDOWS windows, for batches of
    `batch_sizes` rows, which data_size divides: in blocks of a multiple of gcd(batch_sizes) / data_size rows.

    Columns: `ids`, `segments` (seq_len + 1), integers as wide as needed; `position` int64 (epoch, window, offset) of the row; `counts`
    int64, COUNTED of the row's window and of those right before it that gave no row, on its first row only (0 elsewhere), so that sums over
    rows count each record once.
    """
    context = _safe_context()
    context.execution_options.preserve_order = True
    unit_rows = gcd(*batch_sizes)
    group = units_per_group(recipe.seq_len, unit_rows, num_rows // unit_rows)
    group_rows = group * unit_rows
    num_rows = -(-num_rows // group_rows) * group_rows
    row_bytes = (recipe.seq_len + 1) * MOST_BYTES_PER_TOKEN
    num_windows = min(MAX_WINDOWS, 2 + int(num_rows * row_bytes / max(1.0, recipe.plan.bytes_per_window)))
    context.set_config(RUN_AHEAD, (windows_ahead, 2 * max(group_rows, *batch_sizes)))
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, RunAhead])
    shared, windows_per_epoch = ray.put(recipe), recipe.plan.windows_per_epoch

    def tokenize(batch: Any) -> Iterator[Any]:
        with scrubbed():
            held, cursor = _held(shared), start.read()
            for number in batch["id"].tolist():
                yield from _window_block(held, cursor, number, quarantine, cache)

    def deal(rows: Any) -> dict[str, np.ndarray]:
        if len(rows["ids"]) == group_rows:
            slice_rows = cache.slice if cache else None
            counts = with_empty_windows(
                rows["counts"], rows["position"], windows_per_epoch, lambda: (_held(shared), start.read()), slice_rows
            )
            rows = rows | {"counts": counts}
        return rank_major(group_rows, group, data_size, rows)

    # Not ray.data.range: its numbers would be made by tasks, which take turns with tokenizing.
    numbers = ray.data.from_items([{"id": n} for n in range(num_windows)], override_num_blocks=num_windows)
    windows = numbers.map_batches(tokenize, batch_size=1, compute=ray.data.TaskPoolStrategy(windows_ahead), num_cpus=1)
    # Ray makes one stage of these two, because blocks divide groups: its tasks are given whole groups, cut from one or more windows.
    by_rank = windows.map_batches(deal, batch_size=group_rows)
    return by_rank.repartition(target_num_rows_per_block=group_rows // data_size, strict=True)


def fill_cache(recipe: Recipe, cache: TokenCache, concurrency: int) -> dict[str, int]:
    """Packs every training slice into the cache, `concurrency` at a time; slices, rows, tokens, records and bad records in all."""
    _safe_context()
    plan, shared = recipe.plan, ray.put(recipe)
    total = sum(plan.num_training)

    def fill(batch: Any) -> dict[str, list[int]]:
        held, found = _held(shared), []
        for number in batch["id"].tolist():
            with scrubbed():
                packed = cache.slice(held, held.plan.training_slice(number))
            counts = packed.counts["records"], packed.counts["bad"]
            found.append((1, len(packed.rows), int(packed.rows.filled.sum()), *counts))
        return {name: [sum(column)] for name, column in zip(FILLED, zip(*found, strict=True), strict=True)}

    numbers = ray.data.range(total, override_num_blocks=min(total, MAX_WINDOWS))
    done = numbers.map_batches(fill, compute=ray.data.TaskPoolStrategy(concurrency), num_cpus=1)
    sums: dict[str, int] = dict.fromkeys(FILLED, 0)
    for row in done.iter_rows():
        sums = {name: sums[name] + int(row[name]) for name in FILLED}
    return sums


@lru_cache(maxsize=1)
def _held(shared: Any) -> Recipe:
    """The recipe, taken out of the object store once in a process: with millions of files that takes seconds."""
    return ray.get(shared)


def _safe_context() -> ray.data.DataContext:
    """Ray Data's settings in this process, made quiet; DataError where they would run code found in data."""
    for name in UNSAFE_RAY_DATA_SETTINGS:
        if os.environ.get(name):
            raise DataError(f"{name} is set: it lets Ray Data run code found in data files. Unset it.")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context


def units_per_group(seq_len: int, unit_rows: int, num_units: int) -> int:
    unit_bytes = unit_rows * (seq_len + 1) * 8  # two columns of int32
    return max(1, min(MAX_UNITS_PER_GROUP, GROUP_BYTES // unit_bytes, num_units // MIN_GROUPS))


def rank_major(group_rows: int, units: int, data_size: int, rows: Any) -> dict[str, np.ndarray]:
    """A group's rows, those of data rank 0 first, in each rank's in order. What is left at the end of a pass, less than a group, is
    dropped: it would be dealt to the wrong ranks. The next pass begins with it."""
    if len(rows["ids"]) < group_rows:
        return {name: column[:0] for name, column in rows.items()}
    return {
        name: column.reshape(units, data_size, -1, *column.shape[1:]).swapaxes(0, 1).reshape(column.shape) for name, column in rows.items()
    }


def _window_block(
    recipe: Recipe, cursor: Cursor, number: int, quarantine: Quarantine, cache: TokenCache | None
) -> Iterator[dict[str, Any]]:
    """The window's rows as one block, without those before the cursor."""
    epoch, window = recipe.plan.nth_window(cursor, number)
    packed = make_window(recipe, epoch, window, cursor.began, cache.slice if cache else None)
    quarantine.write(epoch, window, packed)
    num_rows, skip = len(packed.rows), cursor.offset if number == 0 else 0
    left = num_rows - skip
    if left <= 0:
        return
    counts = np.zeros((left, len(COUNTED)), dtype=np.int64)
    if not skip:
        counts[0] = [packed.counts[name] for name in COUNTED]
    place = np.arange(skip, num_rows, dtype=np.int64)
    width = recipe.seq_len + 1
    yield {
        "ids": packed.rows.ids[skip:],
        "segments": packed.rows.segments()[skip:].astype(narrowest(width + 1), copy=False),
        "position": np.stack([np.full(left, epoch), np.full(left, window), place], axis=1),
        "counts": counts,
    }
