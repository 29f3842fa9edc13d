"""The order of the stream, as pure functions of the configuration and the corpus: which slices make up window *n*.

Nothing is read here and nothing is remembered. A **slice** is what one read covers; a **window** is a seeded handful of slices whose
rows are shuffled together; the **cursor** names the next sequence. Three workers or thirty, restarted or not, ask the same question and
get the same answer, for 10^9 slices as fast as for ten.

Windows come in **blocks**: within a block every source gives an exact number of slices. Without weights a block is an epoch, in which each
slice occurs once. With weights it is a few hundred slots, so that the mixture holds locally too, and an epoch is as many blocks as hold
about as many slots as the corpus has slices. A source's slices follow one another in passes, each in an order of its own, however its
passes lie to the epochs.

Example. Two sources of 6 and 2 slices, blocks of 4 slots from each, `window_slices=4`: each block has 2 windows. The first source goes
through its 6 slices in 1.5 blocks, the second through its 2 slices twice a block.

A **stage** changes the mixture at a step. Which window that step falls into is known only once the rows before it are counted, so the
cursor carries along in which block each later stage began: from the first block that is not yet begun at that step.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from llm.data.slices import Slice, SourceSlices

# A block of a weighted mixture has so many slots that the smallest share is met to an eighth, within these limits.
MIN_BLOCK_SLOTS, MAX_BLOCK_SLOTS = 256, 1 << 16
MIN_SLOTS_PER_SOURCE = 4
HELD_OUT_SLICES = 4


@dataclass(frozen=True, order=True)
class Cursor:
    """The next sequence of the global order: all of the data state there is."""

    epoch: int = 0
    window: int = 0  # of the epoch
    offset: int = 0  # sequences of that window already taken
    began: tuple[int, ...] = ()  # the block in which each stage after the first began


@dataclass(frozen=True)
class Stage:
    """What every source gives to each block, from a step on."""

    from_step: int
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """When stages begin, by step, and what a cursor must know to begin one. Small: every worker has it."""

    from_steps: tuple[int, ...] = (0,)
    windows_per_block: int = 1
    windows_per_epoch: int = 1

    def at_step(self, cursor: Cursor, step: int) -> Cursor:
        """The cursor with which `step` (the updates done before it) begins: a stage that begins with it does so in the first block that
        no row was taken from."""
        missing = bisect_right(self.from_steps, step) - 1 - len(cursor.began)
        if missing <= 0:
            return cursor
        windows = cursor.epoch * self.windows_per_epoch + cursor.window + (cursor.offset > 0)
        return replace(cursor, began=(*cursor.began, *[-(-windows // self.windows_per_block)] * missing))


@dataclass(frozen=True)
class CorpusPlan:
    """The slices of every source and how they are mixed. Equal plans give equal streams."""

    sources: tuple[SourceSlices, ...]
    held_out: tuple[int, ...]  # slices of each source that evaluation has and training never sees
    stages: tuple[Stage, ...]  # the first from step 0; all have the same number of slots in a block
    blocks_per_epoch: int
    window_slices: int
    seed: int

    @property
    def slots_per_block(self) -> int:
        return sum(self.stages[0].slots)

    @property
    def windows_per_block(self) -> int:
        return max(1, round(self.slots_per_block / self.window_slices))

    @property
    def windows_per_epoch(self) -> int:
        return self.windows_per_block * self.blocks_per_epoch

    @property
    def schedule(self) -> Schedule:
        return Schedule(tuple(stage.from_step for stage in self.stages), self.windows_per_block, self.windows_per_epoch)

    @property
    def bytes_per_window(self) -> float:
        """Mean text of a window, by each source's mean slice and its least share in any stage."""
        means = [source.text_bytes / max(1, len(source)) for source in self.sources]
        blocks = [sum(n * mean for n, mean in zip(stage.slots, means, strict=True)) for stage in self.stages]
        return min(blocks) / self.windows_per_block

    def window(self, epoch: int, window: int, began: Sequence[int] = ()) -> tuple[Slice, ...]:
        """The slices of a window, in reading order. O(window_slices) whatever the number of slices.

        A keyed permutation deals a block's slots to the sources. The n-th slice that a source ever gives is that of pass n // (its
        training slices), which goes through them in a permutation of its own.
        """
        block, index = divmod(epoch * self.windows_per_epoch + window, self.windows_per_block)
        slots = self.slots_per_block
        first, stop = (slots * i // self.windows_per_block for i in (index, index + 1))
        stage = self.stages[bisect_right(began, block)]
        chosen = []
        for slot in range(first, stop):
            nth = permuted(slot, slots, (self.seed, "slots", block))
            source = 0
            while nth >= stage.slots[source]:
                nth -= stage.slots[source]
                source += 1
            chosen.append(self._slice(source, self._given_before(block, source, began) + nth))
        return tuple(chosen)

    @property
    def num_training(self) -> tuple[int, ...]:
        """Training slices of each source."""
        return tuple(len(source) - held for source, held in zip(self.sources, self.held_out, strict=True))

    def training_slice(self, number: int) -> Slice:
        """The training slices of all sources one after the other, each once, in no particular order."""
        for source, count in enumerate(self.num_training):
            if number < count:
                return self.sources[source][self._shuffled(source, self.held_out[source] + number)]
            number -= count
        raise IndexError(number)

    def held_out_slices(self, source: int) -> list[Slice]:
        slices = self.sources[source]
        return [slices[i] for i in sorted(self._shuffled(source, n) for n in range(self.held_out[source]))]

    def nth_window(self, start: Cursor, n: int) -> tuple[int, int]:
        """(epoch, window) of the n-th window, n = 0, 1, ..., counted from the cursor's own."""
        epochs, window = divmod(start.window + n, self.windows_per_epoch)
        return start.epoch + epochs, window

    def _given_before(self, block: int, source: int, began: Sequence[int]) -> int:
        """Slots that a source has had in all blocks before `block`."""
        edges = [0, *(edge for edge in began if edge < block), block]
        return sum((stop - start) * self.stages[k].slots[source] for k, (start, stop) in enumerate(pairwise(edges)))

    def _slice(self, source: int, nth: int) -> Slice:
        slices, held = self.sources[source], self.held_out[source]
        number, within = divmod(nth, len(slices) - held)
        within = permuted(within, len(slices) - held, (self.seed, slices.name, number))
        return slices[self._shuffled(source, held + within)]

    def _shuffled(self, source: int, n: int) -> int:
        """The first `held_out` slices of this permutation are held out, the others are for training."""
        slices = self.sources[source]
        return permuted(n, len(slices), (self.seed, "hold out", slices.name))


def plan_corpus(
    sources: Sequence[SourceSlices],
    weights: Mapping[str, float | None],
    *,
    held_out: Mapping[str, int],
    window_slices: int,
    seed: int,
    schedule: Iterable[tuple[int, Mapping[str, float]]] = (),
) -> CorpusPlan:
    """The plan of a corpus. Without weights every source gives each of its slices once an epoch. With them a source's slots times its mean
    slice are in proportion to its weight, by largest remainders, with at least one slot for a weight above 0.

    `schedule`: (step, weights by source) of every later stage; a source that is not named has 0. A weight of 0.7 is 70% of the text's
    bytes, near enough of the tokens, where compressed text counts COMPRESSION_RATIO times its size.
    """
    counts = [len(source) - held_out[source.name] for source in sources]
    given = [weights[source.name] for source in sources]
    if any(weight is None for weight in given):
        stages, blocks = [Stage(0, tuple(counts))], 1
    else:
        means = [source.text_bytes / len(source) for source in sources]
        shares = [(step, _shares([by_name.get(s.name) for s in sources], means)) for step, by_name in [(0, weights), *schedule]]
        smallest = min(share for _, row in shares for share in row if share)
        slots = min(MAX_BLOCK_SLOTS, max(MIN_BLOCK_SLOTS, math.ceil(MIN_SLOTS_PER_SOURCE / smallest)))
        stages = [Stage(step, tuple(_apportioned(row, slots))) for step, row in shares]
        blocks = max(1, round(sum(counts) / slots))
    held = tuple(held_out[source.name] for source in sources)
    return CorpusPlan(tuple(sources), held, tuple(stages), blocks, window_slices, seed)


def _shares(weights: Sequence[float | None], means: Sequence[float]) -> list[float]:
    rates = [float(weight or 0) / max(mean, 1.0) for weight, mean in zip(weights, means, strict=True)]
    return [rate / sum(rates) for rate in rates]


def _apportioned(shares: Sequence[float], slots: int) -> list[int]:
    """`slots` shared out by largest remainders, at least one for each share above 0."""
    counts = [max(int(share * slots), 1 if share else 0) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i] * slots, i))
    missing = slots - sum(counts)
    for i in by_remainder[: max(0, missing)]:
        counts[i] += 1
    if missing < 0:  # several shares were too small for a slot: the largest gives them theirs
        counts[counts.index(max(counts))] += missing
    return counts


def hold_out(slices: SourceSlices, needed_bytes: int) -> int:
    """How many slices of a source are held out for evaluation: those that hold `needed_bytes`, about, a few at least, so that they speak
    for the source, and at most half.

    Whole slices are held out, so evaluation reads only them and training never sees them.
    """
    if not needed_bytes:
        return 0
    mean = slices.text_bytes / max(1, len(slices))
    few = min(HELD_OUT_SLICES, len(slices) // (2 * HELD_OUT_SLICES))
    return min(len(slices) // 2, max(few, math.ceil(needed_bytes / max(1.0, mean))))


def permuted(index: int, size: int, key: tuple[int | str, ...]) -> int:
    """Where `index` goes under a keyed permutation of range(size): a four-round Feistel network over the next even number of bits, walked
    until it lands inside (at most 4 expected tries). O(1) time and memory for any size, no list is ever made.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), cycle walking and the generalized Feistel.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    prefix = repr(key).encode()
    short = prefix if len(prefix) <= 64 else hashlib.blake2b(prefix, digest_size=64).digest()
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(4):
            digest = hashlib.blake2b(b"%d %d" % (round_number, right), key=short, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half_bits | right
        if index < size:
            return index
