"""How much memory a micro-batch takes, which one to try next, and which is the largest that fits. Pure.

Peak memory is near a straight line in the rows of a micro-batch: bytes = fixed + per_row * rows. What is fixed are weights, gradients,
optimizer and libraries; what grows are activations and logits. The line only proposes, and halving bounds what a wrong line can cost. What
is believed is a process that has run the size to its end under the limit, or one that ran out of memory with nothing run before it: after
smaller sizes it has their fragments too, and takes more than a run of that size would. At most MAX_PROBES process groups are started.

Example: legal sizes 1 2 3 4 6 8 12 16 24 48, a limit of 10 GiB. Probe 1 climbs 1, 2, 4, 8 and stops, because the line says that 16 would
take 13 GiB. The line puts 12 at 9.9 GiB: probe 2 tries 12, alone in fresh processes. It fits. Probe 3 tries 16, the next larger size, which
runs out of memory. The line puts 24 more than UNSURE_FRAC above the limit: 12 is the largest. Were it nearer, probe 4 would try 24 too:
memory is cut up differently in every process, so one size may fail by chance and a larger one, whose tensors are whole mappings, fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

MAX_PROBES = 5
CLIMB_RATIO = 2  # between the sizes of the first probe, which climbs within one process group
UNSURE_FRAC = 0.2  # above the limit, within which a size is tried though the one below it has failed
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
    def exact(self) -> bool:
        """Whether the next larger legal size has been seen to fail, or there is none."""
        return not self._open()

    def after(self, peaks: Mapping[int, int], failed: Mapping[int, str], limit_bytes: int | None) -> Search:
        """With one more probe's findings. Of one size the later probe counts, which ran it in fresh processes. What failed after smaller
        sizes had run in the same processes stays open."""
        alone = {} if peaks else failed
        return replace(
            self,
            peaks={rows: peak for rows, peak in {**self.peaks, **peaks}.items() if rows not in alone},
            failed={rows: told for rows, told in {**self.failed, **alone}.items() if rows not in peaks},
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
        return (between[self._proposed(between)],) if between else self._second_look()

    def _proposed(self, between: tuple[int, ...]) -> int:
        """Which of the open sizes to try: the largest that fits by the line, as far as the probes after it can still halve their way to the
        answer on either side of it."""
        line, middle = fit_line(self.peaks), (len(between) - 1) // 2
        answers = 2 ** (MAX_PROBES - self.probes - 1)  # that those probes can tell apart
        least, most = len(between) - answers, answers - 1
        if line is None or self.limit_bytes is None or least > most:
            return middle
        if any(line.at(rows) <= self.limit_bytes for rows in self.failed):
            return middle  # the line has been wrong
        fitting = sum(line.at(rows) <= self.limit_bytes for rows in between)
        return min(max(fitting - 1, least, 0), most)

    def _second_look(self) -> tuple[int, ...]:
        """The size above the next larger one, which has failed, if it is near the limit."""
        above, line = [rows for rows in self.legal if rows > (self.largest or rows)], fit_line(self.peaks)
        if len(above) < 2 or above[1] in self.failed or line is None or self.limit_bytes is None:
            return ()
        return (above[1],) if line.at(above[1]) <= self.limit_bytes * (1 + UNSURE_FRAC) else ()

    def _open(self) -> tuple[int, ...]:
        """Legal sizes of which nothing is known: above the largest that fitted, below the smallest above it that failed."""
        low = self.largest or 0
        high = min((rows for rows in self.failed if rows > low), default=self.legal[-1] + 1)
        return tuple(rows for rows in self.legal if low < rows < high)


def within_margin(search: Search, margin_frac: float) -> int | None:
    """The largest size that fitted with `margin_frac` of the limit to spare; else the next smaller legal one, unless that has failed.

    A run of days meets more than a probe's few steps do: fragments, a checkpoint in flight. None where nothing fits.
    """
    largest = search.largest
    if largest is None or search.limit_bytes is None or search.peaks[largest] <= search.limit_bytes * (1 - margin_frac):
        return largest
    smaller = max((rows for rows in search.legal if rows < largest), default=largest)
    return largest if smaller in search.failed else smaller
