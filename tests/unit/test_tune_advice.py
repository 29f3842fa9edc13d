"""Speeds of two probes are brought together; the recommendation follows from speed, noise and what the user keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llm.train.tune.advice import Advice, advise
from llm.train.tune.noise_scale import NoiseScale
from llm.train.tune.speed import best_rows, knee, speed_of, with_size

ROW = 100  # tokens


def samples(factor: float, *sizes: int) -> dict[tuple[int, int], list[float]]:
    """A microbatch of n rows takes 1 + n seconds, the update 3; each was timed four times, once beside a noisy neighbour."""
    return {(rows, count): [factor * (3 + count * (1 + rows))] * 3 + [9.9 * factor * 50] for rows in sizes for count in (1, 2)}


def advice(noise: NoiseScale | None, keep_batch: bool = False, batch_rows: int = 32) -> Advice:
    speed = speed_of([samples(1.0, 1, 2, 4, 8)])
    assert speed is not None
    return advise(
        speed, fits_rows=8, batch_rows=batch_rows, data_size=2, row_tokens=ROW, noise=noise, tokens_a_row=ROW, keep_batch=keep_batch
    )


def noise_of(rows: float, low: float, high: float) -> NoiseScale:
    return NoiseScale(rows * ROW, low * ROW, high * ROW, 0.95, 40, 1.0, rows * ROW)


def test_the_update_is_told_from_the_microbatches():
    speed = speed_of([samples(1.0, 1, 4)])
    assert speed is not None
    assert speed.update_s == pytest.approx(3.0)
    assert speed.microbatch_s == pytest.approx({1: 2.0, 4: 5.0})
    assert speed.step_s(4, 16) == pytest.approx(83.0)


def test_a_probe_on_a_slower_machine_is_brought_to_the_first():
    speed = speed_of([samples(1.0, 1, 4), samples(3.0, 4, 8)])
    assert speed is not None
    assert speed.microbatch_s == pytest.approx({1: 2.0, 4: 5.0, 8: 9.0})
    assert speed_of([{}, {}]) is None


def test_what_several_probes_have_timed_counts_with_its_mean():
    speed = speed_of(
        [{(4, 1): [2.0], (8, 1): [4.0]}, {(4, 1): [1.0], (8, 1): [2.2]}]
    )  # the second ran on a machine twice as fast, or nearly
    assert speed is not None
    assert speed.steps[4, 1] / speed.steps[8, 1] == pytest.approx((2.0 + 1.0 * 1.909) / (4.0 + 2.2 * 1.909), rel=1e-3)


def test_a_size_that_was_not_timed_is_as_fast_a_row_as_its_neighbour():
    speed = speed_of([samples(1.0, 1, 4)])
    assert speed is not None
    assert with_size(speed, 3).microbatch_s[3] == pytest.approx(3.75)


def test_timings_that_a_neighbour_made_long_do_not_hide_the_fastest():
    """4 rows are 8% faster than 8, and half of the timings are 40% too long."""
    speed = speed_of([{(4, 1): [1.0, 1.4, 1.4], (4, 2): [2.8, 2.0, 2.8], (8, 1): [3.0, 3.0, 2.16]}])
    assert speed is not None
    found = advise(speed, fits_rows=8, batch_rows=16, data_size=2, row_tokens=ROW, noise=None, tokens_a_row=ROW, keep_batch=True)
    assert found.now.microbatch_rows == 4


def test_the_largest_is_taken_unless_a_smaller_one_is_faster():
    assert best_rows({4: 100.0, 8: 99.0}, 8, 0.02) == 8
    assert best_rows({4: 100.0, 8: 97.0}, 8, 0.02) == 4
    assert knee({1: 10, 2: 90, 4: 96, 8: 100}) == 4


def test_the_batch_goes_to_the_shortest_time_where_more_rows_are_only_more_accumulation():
    """A critical batch of 200 rows, and 3 + 9 x accumulation seconds a step of 16 x accumulation rows: 32 rows take the shortest time."""
    found = advice(noise_of(200, 150, 260), batch_rows=512)
    assert (found.batch.rows, found.batch.microbatch_rows, found.batch.accumulation) == (32, 8, 2)
    assert found.critical_rows == pytest.approx(200)
    assert found.batch.time == pytest.approx((1 + 200 / 32) * 21 / ((1 + 200 / 512) * 291))
    assert found.batch.tokens == pytest.approx((1 + 32 / 200) / (1 + 512 / 200))
    assert (found.now.time, found.now.tokens) == (1.0, 1.0)
    assert found.at_critical is not None and found.at_critical.rows == 192 and found.at_critical.time > found.batch.time
    assert found.batch.time == min(batch.time for batch in found.curve)
    assert found.how_sure.startswith("sure")


def test_a_batch_above_the_critical_one_is_never_recommended():
    found = advice(noise_of(5, 2, 12))
    assert (found.batch.rows, found.batch.microbatch_rows, found.batch.accumulation) == (4, 2, 1)
    assert found.how_sure.startswith("rough")


@pytest.mark.parametrize(
    ("noise", "keep", "why"),
    [
        (noise_of(200, 150, 260), True, "was to stay"),
        (noise_of(200, 150, 260), False, "shorter by more than 5%"),
        (noise_of(900, 100, math.inf), False, "cannot be told from noise yet"),
        (NoiseScale(math.inf, 100.0 * ROW, math.inf, 0.95, 40, -1.0, 1.0), False, "is above 100 rows"),
        (None, False, "not measured"),
    ],
)
def test_the_batch_stays_where_nothing_speaks_against_it(noise, keep, why):
    found = advice(noise, keep)
    assert (found.batch.rows, found.batch.microbatch_rows) == (32, 8)
    assert why in found.why


def test_no_noise_at_all_is_a_critical_batch_of_less_than_a_row():
    assert advice(replace(noise_of(1, 0, 2), tokens=0.0)).batch.rows == 2
