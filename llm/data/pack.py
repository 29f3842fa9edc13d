"""Documents' token ids -> rows of `seq_len + 1` ids, without padding waste.

Documents follow one another, each ended by its end-of-document token, and the line is cut every `seq_len + 1` ids: a document longer than
a row goes on in the next, nothing is lost, and only the last row of a window is padded (a window of 500 rows wastes about 0.1%).

Segments tell what belongs together: 1, 2, ... number the documents within a row, 0 is padding.

Example, seq_len=4, eos=0: documents [5, 6], [7, 8, 9, 4] -> line 5 6 0 7 8 9 4 0
    ids      [[5, 6, 0, 7, 8], [9, 4, 0, 0, 0]]
    segments [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """`ids` and `segments`: int32 arrays of shape (rows, seq_len + 1)."""

    ids: np.ndarray
    segments: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def real_tokens(self) -> int:
        return int(np.count_nonzero(self.segments))


def pack(documents: Sequence[Sequence[int]], seq_len: int, eos_id: int) -> Rows:
    """The rows of a window's documents, in their order."""
    width = seq_len + 1
    lengths = np.fromiter((len(d) + 1 for d in documents), dtype=np.int64, count=len(documents))
    total = int(lengths.sum())
    num_rows = -(-total // width)
    line = np.full(num_rows * width, eos_id, dtype=np.int32)
    numbers = np.zeros(num_rows * width, dtype=np.int64)
    at = 0
    for number, document in enumerate(documents, start=1):
        line[at : at + len(document)] = document
        numbers[at : at + len(document) + 1] = number
        at += len(document) + 1
    numbers = numbers.reshape(num_rows, width)
    first = numbers[:, :1]
    segments = np.where(numbers > 0, numbers - first + 1, 0).astype(np.int32)
    return Rows(line.reshape(num_rows, width), segments)


def shuffled(rows: Rows, seed: Sequence[int]) -> Rows:
    """The same rows in an order that follows from the seed alone (NumPy's Philox, whose stream is stable across versions)."""
    keys = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed)))).random(len(rows))
    order = np.argsort(keys, kind="stable")
    return Rows(rows.ids[order], rows.segments[order])
