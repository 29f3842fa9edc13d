"""The gradient noise scale, with its confidence interval. Pure.

McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training" (2018), appendix A.1: for batches of B tokens

    E |G_B|^2 = |G|^2 + S / B

so gradients over small and over big batches give both |G|^2 and S, the trace of the gradient's covariance over tokens. B_simple = S / |G|^2
is the batch at which noise and gradient are equally strong; section 2.2 and figure 5 find it near the critical batch size. The quotient is
that of averages over steps: both parts are noisy, and |G|^2 of a single step may be negative.

Its interval is Fieller's (1954) for a quotient of two means measured together. Where the steps do not tell |G|^2 from 0, it has no upper
end, which is the truth: a larger batch, or more steps, would tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

MIN_STEPS = 4
SETTLE_FRAC = 1 / 3  # of the steps, left out at the start: the first gradients of a new model are long, and tell of no later step
PARTS = 8  # microbatches that the whole batch has at least, where it can: fewer say less of the noise


@dataclass(frozen=True)
class StepNorms:
    """Of one step: mean squared gradient norms over small batches and over the whole, both of a mean loss per token, in tokens.

    With small batches of unequal tokens t_i, T in all: `small_square` is the mean weighted by t_i squared, and `small_tokens` the sum of
    t_i squared over T. Then both formulas of A.1 hold whatever the noise of a small batch is in its size: with h_i the gradient of a small
    batch's *summed* loss and v_i its noise, E sum |h_i|^2 = |G|^2 sum t_i^2 + sum v_i, and E |sum h_i|^2 = |G|^2 T^2 + sum v_i. So a row's
    tokens may be alike, and rows of any length, without the result depending on how rows are cut into microbatches.
    """

    step: int
    small_square: float
    big_square: float
    small_tokens: float
    big_tokens: float


@dataclass(frozen=True)
class NoiseScale:
    """`tokens`: S / |G|^2, with the ends of its interval; `steps`: how many it is from. `high_tokens` is infinite where |G|^2 may be 0."""

    tokens: float
    low_tokens: float
    high_tokens: float
    confidence: float
    steps: int
    signal: float  # |G|^2
    noise: float  # S, in tokens


def estimate(norms: Sequence[StepNorms], confidence: float = 0.95) -> NoiseScale | None:
    """None for fewer than MIN_STEPS usable steps: those whose norms are finite and whose whole batch is larger than its parts."""
    pairs = [
        _noise_and_signal(n)
        for n in norms
        if math.isfinite(n.small_square) and math.isfinite(n.big_square) and n.big_tokens > n.small_tokens > 0
    ]
    count = len(pairs)
    if count < MIN_STEPS:
        return None
    noise = math.fsum(s for s, _ in pairs) / count
    signal = math.fsum(g for _, g in pairs) / count
    var_noise = math.fsum((s - noise) ** 2 for s, _ in pairs) / (count - 1) / count
    var_signal = math.fsum((g - signal) ** 2 for _, g in pairs) / (count - 1) / count
    covariance = math.fsum((s - noise) * (g - signal) for s, g in pairs) / (count - 1) / count
    low, high = _fieller(noise, signal, var_noise, var_signal, covariance, student_t(confidence, count - 1))
    tokens = max(0.0, noise) / signal if signal > 0 else math.inf
    return NoiseScale(tokens, min(low, tokens), max(high, tokens), confidence, count, signal, noise)


def without_the_start(norms: Sequence[StepNorms]) -> list[StepNorms]:
    """Without the first SETTLE_FRAC of them."""
    return list(norms[int(len(norms) * SETTLE_FRAC) :])


def small_batch_rows(rank_rows: int, data_size: int, at_most: int) -> int | None:
    """The rows of a microbatch to measure with: the most, not above `at_most`, that leave PARTS in a batch, else as few as can be. None
    where the whole batch is one row."""
    legal = [rows for rows in range(1, min(rank_rows, at_most) + 1) if rank_rows % rows == 0]
    if rank_rows * data_size < 2:
        return None
    return max((rows for rows in legal if rank_rows // rows * data_size >= PARTS), default=1)


def _noise_and_signal(n: StepNorms) -> tuple[float, float]:
    """(S, |G|^2) of one step: unbiased, see A.1."""
    noise = (n.small_square - n.big_square) / (1 / n.small_tokens - 1 / n.big_tokens)
    signal = (n.big_tokens * n.big_square - n.small_tokens * n.small_square) / (n.big_tokens - n.small_tokens)
    return noise, signal


def _fieller(a: float, b: float, var_a: float, var_b: float, cov: float, t: float) -> tuple[float, float]:
    """The ends of the interval of a / b: all r with (a - r b)^2 <= t^2 (var_a - 2 r cov + r^2 var_b), as far as they are at least 0."""
    square, linear, constant = b * b - t * t * var_b, a * b - t * t * cov, a * a - t * t * var_a
    inside = linear * linear - square * constant
    if square <= 0 or b <= 0:
        if inside < 0 or square == 0:
            return 0.0, math.inf
        # The set lies outside of the two roots; its part above 0 begins at the larger one.
        return max(0.0, (linear - math.sqrt(inside)) / square, (linear + math.sqrt(inside)) / square), math.inf
    root = math.sqrt(max(0.0, inside))
    return max(0.0, (linear - root) / square), max(0.0, (linear + root) / square)


def student_t(confidence: float, freedom: int) -> float:
    """The two-sided quantile of Student's t, by the expansion of Abramowitz and Stegun 26.7.5; within 1% from 3 degrees of freedom on."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
