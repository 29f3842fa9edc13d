"""How fast each micro-batch is, and where more rows or more accumulation stop helping. Pure.

A step is its microbatches and one update: step_s = update_s + accumulation * microbatch_s. The update (reducing gradients over data ranks,
clipping, the optimizer) takes the same time for every size; steps with one and with several microbatches tell the two apart. Of several
timings of the same step the shortest counts: a neighbour on the machine only ever makes a step longer, and never the same one of two sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

LEAST_FRAC = 0.05  # of a step, that its microbatches take at least
KNEE_FRAC = 0.95  # of the most tokens/s

Samples = Mapping[tuple[int, int], Sequence[float]]  # (rows, accumulation) -> seconds of each step that was timed


@dataclass(frozen=True)
class Speed:
    """Seconds of one microbatch of each size, and of the update; `steps` are the shortest of what was measured, by (rows, accumulation)."""

    microbatch_s: Mapping[int, float]
    update_s: float
    steps: Mapping[tuple[int, int], float]
    spread_frac: float = 0.0  # by how much the median of a step's timings lies above the shortest: how busy the machine was

    def step_s(self, rows: int, accumulation: int) -> float:
        """Of one step of so many microbatches; measured where it was, else by the model."""
        measured = self.steps.get((rows, accumulation))
        return measured if measured is not None else self.update_s + accumulation * self.microbatch_s[rows]

    def tokens_per_s(self, rows: int, accumulation: int, row_tokens: int, data_size: int) -> float:
        return rows * accumulation * row_tokens * data_size / self.step_s(rows, accumulation)

    def for_rank_rows(self, rank_rows: int, row_tokens: int, data_size: int) -> dict[int, float]:
        """Tokens/s by micro-batch, for a step of so many rows a data rank."""
        return {
            rows: self.tokens_per_s(rows, rank_rows // rows, row_tokens, data_size)
            for rows in sorted(self.microbatch_s)
            if rank_rows % rows == 0
        }


def speed_of(probes: Sequence[Samples]) -> Speed | None:
    """From what each probe timed; None where none did.

    Another probe ran at another moment of the machine. So the times of each are brought to those of the first by what both have measured:
    each probe times a size again that one before it has. A step that several have timed counts with their mean.
    """
    found: dict[tuple[int, int], list[float]] = {}
    spreads = [median(times) / min(times) - 1 for samples in probes for times in samples.values() if times]
    for samples in probes:
        here = {key: min(times) for key, times in samples.items() if times}
        common = [fmean(found[key]) / here[key] for key in here if key in found]
        factor = median(common) if common else 1.0
        for key, step_s in here.items():
            found.setdefault(key, []).append(step_s * factor)
    merged = {key: fmean(times) for key, times in found.items()}
    if not merged:
        return None
    most = {rows: max(count for size, count in merged if size == rows) for rows in sorted({rows for rows, _ in merged})}
    updates = [
        (count * merged[rows, 1] - merged[rows, count]) / (count - 1) for rows, count in most.items() if count > 1 and (rows, 1) in merged
    ]
    update_s = max(0.0, median(updates)) if updates else 0.0
    microbatch_s = {}
    for rows, count in most.items():
        step_s = merged[rows, count]
        # The update is the median over sizes: for a small size on a busy machine, more than its whole step may be.
        microbatch_s[rows] = max(step_s - update_s, LEAST_FRAC * step_s) / count
    return Speed(microbatch_s, update_s, merged, median(spreads))


def with_size(speed: Speed, rows: int) -> Speed:
    """With a size that was not timed: as many seconds a row as the nearest size that was."""
    if rows in speed.microbatch_s:
        return speed
    near = min(speed.microbatch_s, key=lambda timed: abs(timed - rows))
    return replace(speed, microbatch_s={**speed.microbatch_s, rows: speed.microbatch_s[near] * rows / near})


def best_rows(tokens_per_s: Mapping[int, float], largest: int, slack_frac: float) -> int:
    """The micro-batch to use: the largest, unless a smaller one is faster by more than `slack_frac`; then the fastest."""
    fastest = max(tokens_per_s, key=tokens_per_s.__getitem__)
    return largest if tokens_per_s.get(largest, 0.0) >= (1 - slack_frac) * tokens_per_s[fastest] else fastest


def knee(values: Mapping[int, float]) -> int:
    """The smallest key whose value is at least KNEE_FRAC of the greatest."""
    return min(key for key, value in values.items() if value >= KNEE_FRAC * max(values.values()))
