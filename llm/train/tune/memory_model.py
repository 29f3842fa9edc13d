"""How much memory a micro-batch takes, which one to try next, and which is the largest that fits. Pure.

Peak memory is close to a straight line in the rows of a micro-batch: bytes = fixed + per_row * rows. What is fixed are weights, gradients,
optimizer and libraries; what grows are activations and logits. The line only proposes. What is believed is a process that has run the size
to its end under the limit, or one that ran out of memory: at most MAX_PROBES process groups are started for both.

Example: legal sizes 1 2 3 4 6 8 12 16 24 48, a limit of 10 GiB. Probe 1 climbs 1, 2, 4, 8 and stops, because the line says that 16 would
take 13 GiB. The line puts 12 at 9.9 GiB: probe 2 tries 12, alone in fresh processes. It fits. 16 is more than UNSURE_FRAC above the limit:
12 is the largest. Had 12 run out of memory, 8 would be: nothing legal lies between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

MAX_PROBES = 5
CLIMB_RATIO = 2  # between the sizes of the first probe, which climbs within one process group
UNSURE_FRAC = 0.2  # a size that the line puts so little above the limit is tried all the same: a climb's peaks are rather too high
MARGIN_FRAC = 0.02  # of the limit, that the size to use leaves free
RISE_FRAC = 0.002  # a peak that rises less is that of the start-up, or of a smaller size


@dataclass(frozen=True)
class Line:
    """bytes = fixed_bytes + bytes_per_row * rows"""

    fixed_bytes: float
    bytes_per_row: float

    def at(self, rows: int) -> float:
        return self.fixed_bytes + self.bytes_per_row * rows


def legal_rows(rank_rows: int) -> tuple[int, ...]:
    """The micro-batches that share out a data rank's rows evenly, smallest first. 12 -> 1 2 3 4 6 12"""
    return tuple(rows for rows in range(1, rank_rows + 1) if rank_rows % rows == 0)


def fit_line(peaks: Mapping[int, int]) -> Line | None:
    """The line through the peaks (bytes by rows) by least squares; None where fewer than two sizes tell anything.

    A process's peak never falls, so where small sizes stay under what the start-up took, their peaks are equal and tell nothing of a row:
    only the last of them is used.
    """
    sizes = sorted(peaks)
    told = [rows for i, rows in enumerate(sizes) if i + 1 == len(sizes) or peaks[sizes[i + 1]] > peaks[rows] * (1 + RISE_FRAC)]
    if len(told) < 2:
        return None
    mean_rows = sum(told) / len(told)
    mean_bytes = sum(peaks[rows] for rows in told) / len(told)
    spread = sum((rows - mean_rows) ** 2 for rows in told)
    per_row = sum((rows - mean_rows) * (peaks[rows] - mean_bytes) for rows in told) / spread
    return Line(mean_bytes - per_row * mean_rows, per_row)


def climb(legal: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the first probe: from the smallest on, each at least CLIMB_RATIO times the one before, and the largest."""
    chosen = [legal[0]]
    for rows in legal:
        if rows >= CLIMB_RATIO * chosen[-1]:
            chosen.append(rows)
    return tuple(dict.fromkeys([*chosen, legal[-1]]))


def worth_trying(peaks: Mapping[int, int], rows: int, limit_bytes: int) -> bool:
    """Whether a climbing process goes on to `rows`: not where the line puts it above the limit. One that ran out of memory could not
    be timed any more."""
    line = fit_line(peaks)
    return line is None or line.at(rows) <= limit_bytes


@dataclass(frozen=True)
class Search:
    """What is known so far. `peaks`: bytes by rows of what fitted; `failed`: sizes that ran out of memory, with what was seen."""

    legal: tuple[int, ...]
    peaks: Mapping[int, int] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)
    probes: int = 0
    limit_bytes: int | None = None

    @property
    def largest(self) -> int | None:
        """The largest size that has fitted so far."""
        return max(self.peaks, default=None)

    @property
    def smallest_failed(self) -> int | None:
        return min(self.failed, default=None)

    @property
    def exact(self) -> bool:
        """Whether the next larger legal size has been seen to fail, or there is none; else only the line says so."""
        return not self._open() or (self.largest is None and bool(self.failed))

    def after(self, peaks: Mapping[int, int], failed: Mapping[int, str], limit_bytes: int | None) -> Search:
        """With one more probe's findings. Of a size's two peaks that of the later probe stays: it ran that size in fresh processes. A size
        at or above one that has failed once does not fit, whatever was seen before."""
        failed = {**self.failed, **failed}
        return replace(
            self,
            peaks={rows: peak for rows, peak in {**self.peaks, **peaks}.items() if rows < min(failed, default=rows + 1)},
            failed=failed,
            probes=self.probes + 1,
            limit_bytes=limit_bytes or self.limit_bytes,
        )

    def next_sizes(self) -> tuple[int, ...]:
        """The sizes that the next probe shall try, in rising order; empty where nothing is left to learn, or no probe to learn it with."""
        if self.probes >= MAX_PROBES:
            return ()
        if not self.probes:
            return climb(self.legal)
        between = self._open()
        if not between:
            return ()
        middle = between[len(between) // 2]
        line = fit_line(self.peaks)
        if line is None or self.limit_bytes is None:
            return (middle,)
        if any(line.at(rows) <= self.limit_bytes for rows in self.failed):
            return (middle,)  # the line has been wrong: halve what is left
        fitting = [rows for rows in between if line.at(rows) <= self.limit_bytes]
        if fitting:
            return (fitting[-1],)
        return between[:1] if line.at(between[0]) <= self.limit_bytes * (1 + UNSURE_FRAC) else ()

    def _open(self) -> tuple[int, ...]:
        """Legal sizes of which nothing is known: above the largest that fitted, below the smallest that failed."""
        low, high = self.largest or 0, self.smallest_failed or self.legal[-1] + 1
        return tuple(rows for rows in self.legal if low < rows < high)


def within_margin(search: Search, margin_frac: float) -> int | None:
    """The largest size that fitted with `margin_frac` of the limit to spare; else the next smaller legal one, which takes less.

    A run of days meets more than two steps of a probe do: fragments, a checkpoint in flight. None where nothing fits.
    """
    largest = search.largest
    if largest is None or search.limit_bytes is None or search.peaks[largest] <= search.limit_bytes * (1 - margin_frac):
        return largest
    return max((rows for rows in search.legal if rows < largest), default=largest)
