"""The noise scale is found where it is known, and its interval holds it as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llm.train.tune.noise_scale import NoiseScale, StepNorms, estimate, student_t

DIM = 400


def made_up(true_tokens: float, *, ranks: int, small: int, steps: int, seed: int, signal: float = 3.0) -> NoiseScale:
    """From gradients that are drawn: per token normal around one vector of squared length `signal`, with a covariance of trace S."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=DIM)
    mean *= math.sqrt(signal) / np.linalg.norm(mean)
    # Unequal axes, as real gradients have: a power law.
    deviation = np.arange(1, DIM + 1) ** -0.5
    deviation *= math.sqrt(true_tokens * signal) / np.linalg.norm(deviation)
    norms = []
    for step in range(steps):
        parts = mean + deviation * rng.normal(size=(ranks, DIM)) / math.sqrt(small)
        norms.append(StepNorms(step, float((parts**2).sum(axis=1).mean()), float((parts.mean(axis=0) ** 2).sum()), small, small * ranks))
    scale = estimate(norms)
    assert scale is not None
    return scale


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("true_tokens", [300.0, 4_000.0])
def test_known_noise_is_found_within_ten_percent(ranks, true_tokens):
    scale = made_up(true_tokens, ranks=ranks, small=1024, steps=400, seed=1)
    assert scale.tokens == pytest.approx(true_tokens, rel=0.1)
    assert scale.signal == pytest.approx(3.0, rel=0.1)
    assert scale.noise == pytest.approx(3.0 * true_tokens, rel=0.1)
    assert scale.low_tokens < true_tokens < scale.high_tokens


def test_two_and_four_ranks_agree_within_the_interval():
    two, four = (made_up(2_000.0, ranks=ranks, small=2048 // ranks, steps=200, seed=ranks) for ranks in (2, 4))
    assert two.low_tokens < four.tokens < two.high_tokens and four.low_tokens < two.tokens < four.high_tokens


def test_the_interval_holds_the_truth_as_often_as_it_says():
    scales = [made_up(1_000.0, ranks=4, small=64, steps=30, seed=seed) for seed in range(300)]
    held = sum(scale.low_tokens <= 1_000.0 <= scale.high_tokens for scale in scales)
    assert 0.91 <= held / 300 <= 0.985


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_unequal_microbatches_are_weighted_whatever_their_noise_is_in_their_tokens(power):
    """Of 10, 40 and 150 tokens, with noise as their number to the power: rows that are all alike, and tokens that are."""
    rng = np.random.default_rng(0)
    counts, mean, norms = np.array([10, 40, 150]), np.full(DIM, 0.1), []
    total, deviation = counts.sum(), counts ** (power / 2)
    deviation *= math.sqrt(total) / np.linalg.norm(deviation)
    for step in range(1500):
        summed = mean * counts[:, None] + deviation[:, None] * rng.normal(size=(3, DIM))
        small = float((summed**2).sum() / (counts**2).sum())
        norms.append(StepNorms(step, small, float(((summed.sum(axis=0) / total) ** 2).sum()), (counts**2).sum() / total, total))
    scale = estimate(norms)
    assert scale is not None
    of_batch = DIM / total  # the variance of the whole batch's gradient
    assert scale.tokens == pytest.approx(of_batch * total / (DIM * 0.01), rel=0.08)


def test_a_gradient_lost_in_the_noise_has_no_upper_end():
    scale = made_up(1e9, ranks=2, small=16, steps=20, seed=0)
    assert scale.high_tokens == math.inf and scale.low_tokens < 1e9


def test_too_few_usable_steps_give_nothing():
    fine = StepNorms(1, 2.0, 1.0, 10, 20)
    assert estimate([fine] * 3) is None
    assert estimate([fine, fine, fine, StepNorms(2, math.inf, 1.0, 10, 20)]) is None
    assert estimate([StepNorms(1, 1.0, 1.0, 20, 20)] * 9) is None  # one microbatch is the whole batch: nothing to compare


def test_students_t_is_that_of_the_tables():
    for freedom, quantile in ((3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (100, 1.984)):
        assert student_t(0.95, freedom) == pytest.approx(quantile, rel=0.01)
