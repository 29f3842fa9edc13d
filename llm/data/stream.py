"""The Ray Data pipeline: window numbers in, blocks of rows out, in order.

`sequences` makes one task per window run `make_window`, re-cuts the rows into blocks of exactly `block_rows` across window edges, and keeps
the order. `llm/data/split.py` deals block j to data rank j mod data_size. With `block_rows` = the rows that one data rank sees in a step,
step s is made of blocks s * data_size ... (s + 1) * data_size - 1 whatever the data size: always the same batch_rows rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
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
from llm.data.run_ahead import WINDOWS_AHEAD, RunAhead
from llm.data.window import Recipe, WindowCounts, make_window
from llm.errors import DataError
from llm.storage import join, write_bytes

# A task goes through several windows only when there are more windows than this: planning a task costs the driver about 0.1 ms.
MAX_TASKS = 2000

# Bytes of raw text that make a token, at most: a pessimistic bound (English is about 4, numbers 2, some scripts 8) that says
# how many windows to plan for. Windows that turn out not to be needed are never read.
BYTES_PER_TOKEN = 16

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
    recipe: Recipe, cursor: Cursor, *, num_rows: int, block_rows: int, windows_ahead: int, quarantine: Quarantine
) -> ray.data.Dataset:
    """At least `num_rows` rows of the global order from the cursor on (if the corpus holds any text), in blocks of `block_rows`.

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

    context.set_config(WINDOWS_AHEAD, windows_ahead)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, RunAhead])

    row_bytes = (recipe.seq_len + 1) * BYTES_PER_TOKEN
    num_windows = 2 + int(num_rows * row_bytes / max(1.0, recipe.plan.bytes_per_window))
    shared = ray.put(recipe)

    def tokenize(batch: Any) -> Iterator[Any]:
        held = ray.get(shared)
        for number in batch["id"].tolist():
            yield from _window_block(held, cursor, number, quarantine)

    # Not ray.data.range: its numbers would be made by tasks, which take turns with tokenizing.
    numbers = ray.data.from_items([{"id": n} for n in range(num_windows)], override_num_blocks=min(num_windows, MAX_TASKS))
    windows = numbers.map_batches(tokenize, batch_size=1, concurrency=windows_ahead, num_cpus=1)
    return windows.repartition(target_num_rows_per_block=block_rows, strict=True)


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
