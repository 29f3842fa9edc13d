"""The order of the stream, as pure functions of the configuration and the corpus: which slices make up window *i* of epoch *e*.

Nothing is read here and nothing is remembered. A **slice** is what one read covers; a **window** is a seeded handful of slices whose
documents are tokenized, packed and shuffled together; the **cursor** names the next sequence. Three workers or thirty, restarted or
not, ask the same question and get the same answer.

Example. Two sources of 6 and 2 slices, weights 0.5 and 0.5, 8 slots an epoch, `window_slices=4`: each epoch has 2 windows and takes 4
slots from each source. The first source goes through its 6 slices in 1.5 epochs, the second through its 2 slices twice an epoch; each
pass of each source has an order of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Format = Literal["text", "jsonl", "parquet"]
Compression = Literal["gzip", "zstd"]

MIN_SLICE_BYTES = 4096
SLICES_PER_CORPUS = 64  # small corpora are cut finer than data.slice_bytes, so that windows still mix and some can be held out
MIN_SLICES_PER_SOURCE = 8  # a source with fewer (one compressed file, say) is cut into stripes of records


@dataclass(frozen=True)
class SourceFile:
    source: str
    uri: str  # as a person would open it: /data/a.jsonl or s3://bucket/a.jsonl
    path: str  # the same inside its filesystem
    size_bytes: int
    version: str  # ETag where the store has one, else the modification time in ns
    format: Format
    compression: Compression | None = None
    row_group_bytes: tuple[int, ...] = ()  # parquet: size of each row group, in order


@dataclass(frozen=True)
class Slice:
    """What one read covers. One of: several whole small files; bytes [start, stop) of one plain text or JSONL file, where a line belongs
    to the slice in which it begins; row groups [start, stop) of one Parquet file; one whole compressed file.

    With `num_stripes` > 1 it is only those of its records whose number within it (0, 1, ...) is `stripe` modulo `num_stripes`.
    """

    source: str
    files: tuple[SourceFile, ...]
    start: int
    stop: int
    size_bytes: int  # what it is estimated to hold, before decompression
    stripe: int = 0
    num_stripes: int = 1


@dataclass(frozen=True, order=True)
class Cursor:
    """The next sequence of the global order: all of the data state there is."""

    epoch: int = 0
    window: int = 0
    offset: int = 0  # sequences of that window already taken


@dataclass(frozen=True)
class CorpusPlan:
    """The slices of every source with its share of an epoch. Equal plans and seeds give equal streams."""

    names: tuple[str, ...]
    slices: tuple[tuple[Slice, ...], ...]  # by source, in file order
    slots: tuple[int, ...]  # slices that each source contributes to one epoch
    window_slices: int
    seed: int

    @property
    def slots_per_epoch(self) -> int:
        return sum(self.slots)

    @property
    def windows_per_epoch(self) -> int:
        return -(-self.slots_per_epoch // self.window_slices)

    @property
    def bytes_per_window(self) -> float:
        """Mean size of a window, by each source's mean slice."""
        means = [sum(s.size_bytes for s in slices) / len(slices) for slices in self.slices]
        epoch_bytes = sum(n * mean for n, mean in zip(self.slots, means, strict=True))
        return epoch_bytes / self.windows_per_epoch

    def window(self, epoch: int, index: int) -> tuple[Slice, ...]:
        """The slices of window `index` of `epoch`, in reading order. O(window_slices), whatever the number of slices.

        A keyed permutation deals the epoch's slots to the sources, so that each source has exactly its `slots` in every epoch; the
        j-th slot of a source in epoch e stands for the (e * slots + j)-th slice it ever gives, and pass p over a source's n slices
        goes through them in a permutation of its own.
        """
        total = self.slots_per_epoch
        first = index * self.window_slices
        assert 0 <= first < total, f"window {index} is outside the epoch's {self.windows_per_epoch}"
        chosen = []
        for slot in range(first, min(first + self.window_slices, total)):
            dealt = permuted(slot, total, (self.seed, "slots", epoch))
            source = 0
            while dealt >= self.slots[source]:
                dealt -= self.slots[source]
                source += 1
            slices = self.slices[source]
            number, within = divmod(epoch * self.slots[source] + dealt, len(slices))
            chosen.append(slices[permuted(within, len(slices), (self.seed, self.names[source], number))])
        return tuple(chosen)

    def nth_window(self, start: Cursor, n: int) -> tuple[int, int]:
        """(epoch, window) of the n-th window, n = 0, 1, ..., counted from the cursor's own."""
        epochs, window = divmod(start.window + n, self.windows_per_epoch)
        return start.epoch + epochs, window


def plan_corpus(slices: dict[str, list[Slice]], weights: dict[str, float | None], *, window_slices: int, seed: int) -> CorpusPlan:
    """The plan of a corpus from the slices of each source. Without weights every source gives each of its slices once an epoch. With them
    a source's slots times its mean slice are in proportion to its weight (largest remainders), at least one slot a source, and an epoch
    has as many slots as the corpus has slices.

    A weight of 0.7 is 70% of the bytes as they are stored, near enough of the tokens where all sources are stored alike; compressed text
    holds about three times as much.
    """
    names = tuple(slices)
    counts = [len(slices[name]) for name in names]
    given = [weights[name] for name in names]
    if any(weight is None for weight in given):
        slots = counts
    else:
        means = [sum(s.size_bytes for s in slices[name]) / len(slices[name]) for name in names]
        rates = [float(weight or 0) / mean for weight, mean in zip(given, means, strict=True)]
        share = [rate / sum(rates) * sum(counts) for rate in rates]
        slots = [max(1, int(x)) for x in share]
        by_remainder = sorted(range(len(names)), key=lambda i: (int(share[i]) - share[i], i))
        for i in by_remainder[: max(0, sum(counts) - sum(slots))]:
            slots[i] += 1
    return CorpusPlan(names, tuple(tuple(slices[n]) for n in names), tuple(slots), window_slices, seed)


def hold_out(slices: list[Slice], needed_bytes: int, seed: int, source: str) -> tuple[list[Slice], list[Slice]]:
    """(training slices, held-out slices) of one source: the first slices of a keyed permutation that hold `needed_bytes`, at most half.

    Whole slices are held out, so evaluation reads only them and training never sees them.
    """
    held: set[int] = set()
    held_bytes = 0
    for i in range(len(slices) // 2):
        if held_bytes >= needed_bytes:
            break
        chosen = permuted(i, len(slices), (seed, "hold out", source))
        held.add(chosen)
        held_bytes += slices[chosen].size_bytes
    training = [s for i, s in enumerate(slices) if i not in held]
    return training, [slices[i] for i in sorted(held)]


def permuted(index: int, size: int, key: tuple[int | str, ...]) -> int:
    """Where `index` goes under a keyed permutation of range(size): a four-round Feistel network over the next even number of bits, walked
    until it lands inside (at most 4 expected tries). O(1) time and memory for any size, no list is ever made.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), cycle walking and the generalized Feistel.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    prefix = repr(key).encode()
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(4):
            digest = hashlib.blake2b(b"%d %d" % (round_number, right), key=_short_key(prefix), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half_bits | right
        if index < size:
            return index


def _short_key(prefix: bytes) -> bytes:
    return prefix if len(prefix) <= 64 else hashlib.blake2b(prefix, digest_size=64).digest()
