"""Documents' token ids -> rows of `seq_len + 1` ids, without padding waste.

A document longer than a row is cut into whole rows and a rest; nothing is lost. Rests and short documents are packed by best-fit
decreasing, each into the fullest row that still holds it, so that nearly all of them stay whole (Ding et al., "Fewer Truncations Improve
Language Modeling", 2024). Where that leaves rows part empty, documents are cut after all: their rows are refilled one after the other, so
that only the last row may be padded, and otherwise not more than MAX_GAP_FRAC of all positions.

Segments tell what belongs together: 1, 2, ... number the pieces of documents within a row, 0 is padding.

Example, seq_len=4, eos=0: documents [5, 6], [7, 8, 9, 4, 3, 2], [1] -> ends added: 5 6 0, 7 8 9 4 3 2 0, 1 0
    ids      [[7, 8, 9, 4, 3], [5, 6, 0, 2, 0], [1, 0, 0, 0, 0]]
    segments [[1, 1, 1, 1, 1], [1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MAX_GAP_FRAC = 0.001
BLOCK_TOKENS = 1 << 18  # moved to their rows at once: the indices of all would take ten times the memory of the tokens

# Columns of `Rows.pieces`.
ROW, COLUMN, DOCUMENT, OFFSET, LENGTH = range(5)


@dataclass(frozen=True)
class Rows:
    """`ids`: integers (rows, seq_len + 1), the end-of-document id where there is padding. `pieces`: int32 (pieces, 5), by row and column:
    the piece of `length` ids in that place is from `offset` on of that document."""

    ids: np.ndarray
    pieces: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def filled(self) -> np.ndarray:
        """Real tokens of each row, int64 (rows)."""
        return np.bincount(self.pieces[:, ROW], self.pieces[:, LENGTH], len(self)).astype(np.int64)

    def segments(self) -> np.ndarray:
        """int32, of the shape of `ids`."""
        width = self.ids.shape[1]
        rows, lengths = self.pieces[:, ROW], self.pieces[:, LENGTH]
        first_of_row = np.searchsorted(rows, rows, side="left")
        numbers = (np.arange(len(rows)) - first_of_row + 1).astype(np.int32)
        if int(lengths.sum()) == len(self) * width:
            return np.repeat(numbers, lengths).reshape(len(self), width)
        found = np.zeros(self.ids.shape, dtype=np.int32)
        found[np.arange(width)[None] < self.filled[:, None]] = np.repeat(numbers, lengths)
        return found

    def taken(self, order: np.ndarray) -> Rows:
        """The rows `order[0]`, `order[1]`, ... (each at most once)."""
        place = np.full(len(self), -1, dtype=np.int64)
        place[order] = np.arange(len(order))
        moved = place[self.pieces[:, ROW]]
        kept = np.flatnonzero(moved >= 0)
        kept = kept[np.argsort(moved[kept], kind="stable")]
        pieces = self.pieces[kept].copy()
        pieces[:, ROW] = moved[kept]
        return Rows(self.ids[order], pieces)


def pack(tokens: np.ndarray, lengths: Sequence[int] | np.ndarray, seq_len: int, eos_id: int) -> Rows:
    """The rows of documents that lie in `tokens` one after the other, each with its end-of-document id, `lengths` ids each."""
    width = seq_len + 1
    sizes = np.asarray(lengths, dtype=np.int64)
    begins = np.cumsum(sizes) - sizes
    whole, rests = np.divmod(sizes, width)
    # Whole rows of long documents.
    number = np.repeat(np.arange(len(sizes)), whole)
    nth = np.arange(len(number)) - np.repeat(np.cumsum(whole) - whole, whole)
    full = _pieces(np.arange(len(number)), 0, number, nth * width, width)
    # Everything else.
    rest_of = np.flatnonzero(rests)
    bins = _best_fit(rests[rest_of].tolist(), width)
    order = rest_of[np.fromiter((i for each in bins for i in each), dtype=np.int64, count=len(rest_of))]
    row = np.repeat(np.arange(len(bins)), np.fromiter(map(len, bins), dtype=np.int64, count=len(bins))) + len(number)
    packed = _pieces(row, _columns(row, rests[order]), order, whole[order] * width, rests[order])
    pieces = np.concatenate([full, packed])
    num_rows = len(number) + len(bins)
    return refilled(_laid(tokens, begins, pieces, num_rows, width, eos_id), eos_id)


def refilled(rows: Rows, eos_id: int) -> Rows:
    """The same tokens with at most one padded row beyond MAX_GAP_FRAC of all positions: the emptiest rows' pieces follow one another, cut
    where a row ends, and come last."""
    width = rows.ids.shape[1]
    gaps = width - rows.filled
    if np.count_nonzero(gaps) <= 1:
        return rows
    by_gap = np.argsort(gaps, kind="stable")
    allowed = np.searchsorted(np.cumsum(gaps[by_gap]), MAX_GAP_FRAC * rows.filled.sum(), side="right")
    kept, emptied = np.sort(by_gap[:allowed]), np.sort(by_gap[allowed:])
    if len(emptied) <= 1 or gaps[emptied].sum() < width:
        return rows
    old = rows.taken(emptied)
    line = old.ids[np.arange(width)[None] < old.filled[:, None]]
    num_rows = -(-len(line) // width)
    ids = np.full(num_rows * width, eos_id, dtype=rows.ids.dtype)
    ids[: len(line)] = line
    stay = rows.taken(kept)
    pieces = _cut(old.pieces, width)
    pieces[:, ROW] += len(kept)
    return Rows(np.concatenate([stay.ids, ids.reshape(num_rows, width)]), np.concatenate([stay.pieces, pieces]))


def joined(parts: Sequence[Rows], documents: Sequence[int]) -> Rows:
    """Rows one after the other; `documents` counts each part's documents, so that their numbers go on."""
    pieces, row, document = [], 0, 0
    for part, count in zip(parts, documents, strict=True):
        pieces.append(part.pieces + np.array([row, 0, document, 0, 0], dtype=np.int32))
        row, document = row + len(part), document + count
    return Rows(np.concatenate([part.ids for part in parts]), np.concatenate(pieces))


def shuffle_order(num_rows: int, seed: Sequence[int]) -> np.ndarray:
    """An order of rows that follows from the seed alone (NumPy's Philox, whose stream is stable across versions)."""
    keys = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed)))).random(num_rows)
    return np.argsort(keys, kind="stable")


def narrowest(size: int) -> type[np.uint16] | type[np.int32]:
    """The type for numbers below `size`."""
    return np.uint16 if size <= 1 << 16 else np.int32


def no_rows(seq_len: int, kind: type[np.integer] = np.int32) -> Rows:
    return Rows(np.zeros((0, seq_len + 1), dtype=kind), np.zeros((0, 5), dtype=np.int32))


def _best_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Which of `lengths` share a row, longest first: each goes into the row with the least room that holds it."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(rooms, lengths[i])
        if at == len(rooms):
            number, room = len(rows), width
            rows.append([i])
        else:
            room = rooms[at]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
            rows[number].append(i)
        room -= lengths[i]
        if room in by_room:
            by_room[room].append(number)
        elif room:
            by_room[room] = [number]
            insort(rooms, room)
    return rows


def _laid(tokens: np.ndarray, begins: np.ndarray, pieces: np.ndarray, num_rows: int, width: int, eos_id: int) -> Rows:
    ids = np.full(num_rows * width, eos_id, dtype=tokens.dtype)
    lengths = pieces[:, LENGTH].astype(np.int64)
    to = pieces[:, ROW].astype(np.int64) * width + pieces[:, COLUMN]
    from_ = begins[pieces[:, DOCUMENT]] + pieces[:, OFFSET]
    ends = np.cumsum(lengths)
    blocks = np.searchsorted(ends, np.arange(0, int(ends[-1]) if len(ends) else 0, BLOCK_TOKENS))
    for first, last in pairwise([*blocks.tolist(), len(pieces)]):
        sizes = lengths[first:last]
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids[np.repeat(to[first:last], sizes) + within] = tokens[np.repeat(from_[first:last], sizes) + within]
    return Rows(ids.reshape(num_rows, width), pieces)


def _cut(pieces: np.ndarray, width: int) -> np.ndarray:
    """The pieces laid out one after the other and cut at the ends of rows of `width`."""
    lengths = pieces[:, LENGTH].astype(np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    edges = np.union1d(np.concatenate([[0], ends]), np.arange(0, total, width))
    edges = edges[edges <= total]
    starts, sizes = edges[:-1], np.diff(edges)
    of = np.searchsorted(ends, starts, side="right")
    offsets = pieces[of, OFFSET] + starts - (ends - lengths)[of]
    return _pieces(starts // width, starts % width, pieces[of, DOCUMENT], offsets, sizes)


def _columns(row: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Where each piece begins in its row; `row` goes up."""
    ends = np.cumsum(lengths)
    first = np.searchsorted(row, row, side="left")
    return ends - lengths - (ends - lengths)[first]


def _pieces(row: np.ndarray, column: np.ndarray | int, document: np.ndarray, offset: np.ndarray, length: np.ndarray | int) -> np.ndarray:
    found = np.empty((len(row), 5), dtype=np.int32)
    for i, values in enumerate((row, column, document, offset, length)):
        found[:, i] = values
    return found
