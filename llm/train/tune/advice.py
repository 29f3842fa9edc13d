"""The trade-off between time and tokens over batch sizes, and one recommendation. Pure.

With a critical batch size of B_crit, training to a given loss with batches of B takes, by McCandlish et al. (2018), section 2.3,

    steps  = S_min (1 + B_crit / B)        tokens = E_min (1 + B / B_crit)

so a batch of B_crit takes twice the fewest steps and twice the fewest tokens. With a measured time of a step, steps become time; on
hardware of a fixed size, time is cost as well. S_min, E_min and the loss stay unknown: all figures are relative.

The recommended batch is that of the shortest time on the hardware that was measured, never above the critical one. It is not always near
B_crit: where more rows only mean more accumulation, at the same tokens/s, time grows as B + B_crit, and B_crit would take longer *and* more
tokens. What B_crit tells is how far more data ranks pay, so it is reported beside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llm.train.tune.noise_scale import NoiseScale
from llm.train.tune.speed import Speed, best_rows, knee, with_size

TIE_FRAC = 0.01  # of tokens/s, by which timings of one size differ: given up for the largest micro-batch
SLACK_FRAC = 0.02  # of the time, given up for a smaller batch
WORTH_FRAC = 0.05  # of the time, for which a user's own batch size is left
SURE, ROUGH = 2.0, 8.0  # high end over low end of the noise scale's interval
LEAST_ROWS = 1 / 16  # of a critical batch size: less than a row is a row
CURVE_ENDS = 16  # the curve goes from the critical batch size over this to so many times it


@dataclass(frozen=True)
class Batch:
    """One batch size, of `rows` sequences. `time` and `tokens` to a given loss, as multiples of what `train.batch_rows` takes."""

    rows: int
    microbatch_rows: int
    accumulation: int
    tokens_per_s: float
    time: float
    tokens: float


@dataclass(frozen=True)
class Advice:
    """`now` is the run's own batch with the best micro-batch, `batch` the one to use. `curve` is empty where no noise scale is known."""

    microbatch_knee: int
    accumulation_knee: int
    tokens_per_s: Mapping[int, float]
    by_accumulation: Mapping[int, float]
    critical_rows: float | None
    at_critical: Batch | None
    batch: Batch
    now: Batch
    curve: tuple[Batch, ...]
    why: str
    how_sure: str


def advise(
    speed: Speed,
    *,
    fits_rows: int,
    batch_rows: int,
    data_size: int,
    row_tokens: int,
    noise: NoiseScale | None,
    tokens_a_row: float,
    keep_batch: bool,
) -> Advice:
    """`fits_rows`: the largest micro-batch to use; `row_tokens`: tokens a row that speed counts; `tokens_a_row`: those of them that the
    loss is over, in which noise is measured."""
    speed = with_size(speed, fits_rows)
    rates = speed.for_rank_rows(batch_rows // data_size, row_tokens, data_size)
    rates = {rows: rate for rows, rate in rates.items() if rows <= fits_rows}
    rows = best_rows(rates, fits_rows, TIE_FRAC)
    by_accumulation = {2**n: speed.tokens_per_s(rows, 2**n, row_tokens, data_size) for n in range(8)}
    critical = max(LEAST_ROWS, noise.tokens / tokens_a_row) if noise and math.isfinite(noise.tokens) else None
    layout = _Layout(speed, data_size, row_tokens, rows, critical or math.inf)
    now = layout.batch(batch_rows, rows)
    chosen, why = _chosen(layout, now, noise, tokens_a_row, keep_batch)
    curve = layout.curve() if critical else ()

    def relative(batch: Batch) -> Batch:
        return replace(batch, time=batch.time / now.time, tokens=batch.tokens / now.tokens)

    return Advice(
        microbatch_knee=knee(rates),
        accumulation_knee=knee(by_accumulation),
        tokens_per_s=rates,
        by_accumulation=by_accumulation,
        critical_rows=critical,
        at_critical=relative(layout.nearest(critical)) if critical else None,
        batch=relative(chosen),
        now=relative(now),
        curve=tuple(relative(batch) for batch in curve),
        why=why,
        how_sure=_how_sure(noise),
    )


@dataclass(frozen=True)
class _Layout:
    """`critical`: in rows, infinite where it is not known: then only steps are compared."""

    speed: Speed
    data_size: int
    row_tokens: int
    microbatch_rows: int
    critical: float

    def batch(self, rows: int, microbatch_rows: int) -> Batch:
        accumulation = rows // (self.data_size * microbatch_rows)
        step_s = self.speed.step_s(microbatch_rows, accumulation)
        known = math.isfinite(self.critical)
        steps = 1 + self.critical / rows if known else 1 / rows
        tokens = 1 + rows / self.critical if known else 1.0
        return Batch(rows, microbatch_rows, accumulation, rows * self.row_tokens / step_s, steps * step_s, tokens)

    def nearest(self, rows: float) -> Batch:
        """The legal batch nearest to so many rows: whole micro-batches on every data rank, smaller ones where one of them is too much."""
        unit = self.data_size * self.microbatch_rows
        if rows >= unit:
            return self.batch(round(rows / unit) * unit, self.microbatch_rows)
        sizes = [size for size in self.speed.microbatch_s if size <= self.microbatch_rows]
        size = min(sizes, key=lambda size: (abs(math.log(size * self.data_size / rows)), size))
        return self.batch(size * self.data_size, size)

    def curve(self) -> tuple[Batch, ...]:
        around = [self.critical * 2 ** (n / 2) for n in range(-2 * int(math.log2(CURVE_ENDS)), 2 * int(math.log2(CURVE_ENDS)) + 1)]
        found = {batch.rows: batch for batch in map(self.nearest, around)}
        return tuple(found[rows] for rows in sorted(found))


def _chosen(layout: _Layout, now: Batch, noise: NoiseScale | None, tokens_a_row: float, keep_batch: bool) -> tuple[Batch, str]:
    if keep_batch:
        return now, "train.batch_rows was to stay"
    if noise is None:
        return now, "the noise scale was not measured, so train.batch_rows stays"
    if not math.isfinite(noise.high_tokens):
        least = noise.low_tokens / tokens_a_row
        return now, f"the gradient cannot be told from noise yet, so train.batch_rows stays; the critical batch is above {least:.3g} rows"
    at_most = layout.nearest(layout.critical)
    choices = [batch for batch in (*layout.curve(), at_most) if batch.rows <= at_most.rows]
    shortest = min(batch.time for batch in choices)
    if now.time <= (1 + WORTH_FRAC) * shortest:
        return now, f"no batch brings the loss down in a time shorter by more than {WORTH_FRAC:.0%}"
    best = min((batch for batch in choices if batch.time <= (1 + SLACK_FRAC) * shortest), key=lambda batch: batch.rows)
    return best, "the shortest time to a loss on this hardware, at no more than the critical batch size"


def _how_sure(noise: NoiseScale | None) -> str:
    if noise is None:
        return ""  # `why` says that it was not measured
    if not math.isfinite(noise.high_tokens) or noise.low_tokens <= 0:
        return "unsure: more --steps, or a larger batch, would tell"
    ratio = noise.high_tokens / noise.low_tokens
    return f"{'sure' if ratio <= SURE else 'rough' if ratio <= ROUGH else 'unsure'}: the interval's ends are {ratio:.2g} times apart"
