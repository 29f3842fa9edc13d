"""The Ray Data pipeline: window numbers in, blocks of rows out, in order.

`sequences` makes one task per window run `make_window` and re-cuts the rows, across window edges, into groups of a few whole batches. Each
group is put in rank-major order and cut into one block for each data rank: its rows of these batches, one batch after the other.
`llm/data/split.py` deals block j to data rank j mod data_size. So step s is the rows s * batch_rows ... (s + 1) * batch_rows - 1 from the
cursor on, whatever the data size.

Example: batch_rows=4, data_size=2, groups of 2 batches: rows 0 1 2 3 | 4 5 6 7 become the blocks 0 1 4 5 and 2 3 6 7.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)

from llm.config import S3Section
from llm.data.order import Cursor
from llm.data.run_ahead import RUN_AHEAD, RunAhead
from llm.data.window import Recipe, WindowCounts, make_window
from llm.errors import DataError
from llm.storage import join, write_bytes

# A task goes through several windows only when there are more windows than this: planning a task costs the driver about 0.1 ms.
MAX_TASKS = 2000

# Bytes of raw text that make a token, at most: a pessimistic bound (English is about 4, numbers 2, some scripts 8) that says
# how many windows to plan for. Windows that turn out not to be needed are never read.
BYTES_PER_TOKEN = 16

# A block costs Ray 5 to 10 ms, in the task that makes it and in the one process that deals all blocks: with one a step and data rank, that
# would be what limits small models. Large rows are not worth holding back for it.
MAX_BATCHES_PER_GROUP = 16
GROUP_BYTES = 8 << 20

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

    def write(self, epoch: int, window: int, counts: WindowCounts) -> None:
        if not counts.bad:
            return
        lines = [json.dumps({"uri": b.uri, "position": b.position, "reason": b.reason}) + "\n" for b in counts.bad]
        write_bytes(join(self.folder, f"epoch-{epoch}-window-{window}.jsonl"), "".join(lines).encode(), self.s3)


def sequences(
    recipe: Recipe, cursor: Cursor, *, num_batches: int, batch_rows: int, data_size: int, windows_ahead: int, quarantine: Quarantine
) -> ray.data.Dataset:
    """At least `num_batches` batches of the global order from the cursor on (if the corpus holds any text), in blocks of a multiple of
    batch_rows / data_size rows.

    Columns: `ids`, `segments` int32 (seq_len + 1); `position` int64 (epoch, window, offset) of the row; `records`, `bad` int32: what
    the row's window read, on its first row only (0 elsewhere), so that sums over rows count each record once.
    """
    for name in UNSAFE_RAY_DATA_SETTINGS:
        if os.environ.get(name):
            raise DataError(f"{name} is set: it lets Ray Data run code found in data files. Unset it.")
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    group = batches_per_group(recipe.seq_len, batch_rows, num_batches)
    group_rows = group * batch_rows
    num_rows = -(-num_batches // group) * group_rows
    row_bytes = (recipe.seq_len + 1) * BYTES_PER_TOKEN
    num_windows = 2 + int(num_rows * row_bytes / max(1.0, recipe.plan.bytes_per_window))
    context.set_config(RUN_AHEAD, (windows_ahead, 2 * group_rows))
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, RunAhead])
    shared = ray.put(recipe)

    def tokenize(batch: Any) -> Iterator[Any]:
        held = ray.get(shared)
        for number in batch["id"].tolist():
            yield from _window_block(held, cursor, number, quarantine)

    # Not ray.data.range: its numbers would be made by tasks, which take turns with tokenizing.
    numbers = ray.data.from_items([{"id": n} for n in range(num_windows)], override_num_blocks=min(num_windows, MAX_TASKS))
    windows = numbers.map_batches(tokenize, batch_size=1, concurrency=windows_ahead, num_cpus=1)
    groups = windows.repartition(target_num_rows_per_block=group_rows, strict=True)
    if data_size == 1:
        return groups
    by_rank = groups.map_batches(partial(rank_major, group_rows, group, data_size), batch_size=group_rows)
    return by_rank.repartition(target_num_rows_per_block=group_rows // data_size, strict=True)


def batches_per_group(seq_len: int, batch_rows: int, num_batches: int) -> int:
    batch_bytes = batch_rows * (seq_len + 1) * 8  # two columns of int32
    return max(1, min(MAX_BATCHES_PER_GROUP, GROUP_BYTES // batch_bytes, num_batches))


def rank_major(group_rows: int, batches: int, data_size: int, rows: Any) -> dict[str, np.ndarray]:
    """A group's rows, those of data rank 0 first, in each rank's in order. What is left at the end of the stream, less than a group, is
    dropped: it would be dealt to the wrong ranks."""
    if len(rows["ids"]) < group_rows:
        return {name: column[:0] for name, column in rows.items()}
    return {
        name: column.reshape(batches, data_size, -1, *column.shape[1:]).swapaxes(0, 1).reshape(column.shape)
        for name, column in rows.items()
    }


def _window_block(recipe: Recipe, cursor: Cursor, number: int, quarantine: Quarantine) -> Iterator[dict[str, Any]]:
    """The window's rows as one block, without those before the cursor."""
    epoch, window = recipe.plan.nth_window(cursor, number)
    rows, counts = make_window(recipe, epoch, window)
    quarantine.write(epoch, window, counts)
    skip = cursor.offset if number == 0 else 0
    left = len(rows) - skip
    if left <= 0:
        return
    offsets = np.arange(skip, len(rows), dtype=np.int64)
    first = np.zeros(left, dtype=np.int32)
    first[0] = 1
    yield {
        "ids": rows.ids[skip:],
        "segments": rows.segments[skip:],
        "position": np.stack([np.full(left, epoch), np.full(left, window), offsets], axis=1),
        "records": first * counts.records,
        "bad": first * len(counts.bad),
    }
