"""The search finds the largest micro-batch that fits, in at most five probes, also where memory is no straight line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.train.tune.memory_model import MAX_PROBES, Search, climb, fit_line, legal_rows, within_margin, worth_trying

GIB = 1 << 30
MACHINES = {
    "rank_rows": st.integers(1, 128),
    "fixed": st.integers(1, 40 * GIB),
    "per_row": st.integers(1 << 20, 4 * GIB),
    "limit": st.integers(1 * GIB, 80 * GIB),
}
INFLATION = st.lists(st.floats(1.0, 1.3), min_size=16, max_size=16)


def search(rank_rows: int, memory: Callable[[int], int], limit_bytes: int, crowded: Callable[[int], int] | None = None) -> Search:
    """The search on a machine where a size takes `memory(rows)` by itself, and `crowded(rows)` after smaller ones in the same processes."""
    found = Search(legal_rows(rank_rows), limit_bytes=limit_bytes)
    while sizes := found.next_sizes():
        peaks, failed = {}, {}
        for rows in sizes:
            if not worth_trying(peaks, rows, limit_bytes):
                break
            peak = (crowded or memory)(rows) if peaks else memory(rows)
            if peak > limit_bytes:
                failed[rows] = "out of memory"
                break
            peaks[rows] = peak
        found = found.after(peaks, failed, limit_bytes)
    return found


def truth(rank_rows: int, memory, limit_bytes: int) -> int | None:
    return max((rows for rows in legal_rows(rank_rows) if memory(rows) <= limit_bytes), default=None)


@given(
    rank_rows=st.integers(1, 512),
    fixed=st.integers(1, 40 * GIB),
    per_row=st.integers(1 << 20, 4 * GIB),
    limit=st.integers(1 * GIB, 80 * GIB),
)
def test_on_a_straight_line_the_answer_is_exact(rank_rows, fixed, per_row, limit):
    def memory(rows: int) -> int:
        return fixed + per_row * rows

    found = search(rank_rows, memory, limit)
    assert found.largest == truth(rank_rows, memory, limit)
    assert found.probes <= MAX_PROBES


@given(
    rank_rows=st.integers(1, 512),
    fixed=st.integers(1, 40 * GIB),
    per_row=st.integers(1 << 20, 4 * GIB),
    limit=st.integers(1 * GIB, 80 * GIB),
    bends=st.lists(st.floats(0.93, 1.07), min_size=16, max_size=16),
    start_up=st.integers(0, 8 * GIB),
)
def test_crooked_memory_is_missed_by_one_legal_size_at_most(rank_rows, fixed, per_row, limit, bends, start_up):
    """A start-up that hides small sizes, and rows that take up to 7% more or less than the line."""
    peak = {}
    for rows in legal_rows(rank_rows):
        peak[rows] = max(start_up, *peak.values(), int(fixed + per_row * rows * bends[rows % 16]), 0)
    found = search(rank_rows, peak.__getitem__, limit)
    best, legal = truth(rank_rows, peak.__getitem__, limit), legal_rows(rank_rows)
    assert found.probes <= MAX_PROBES
    if best is None:
        assert found.largest is None and found.failed
    else:
        assert found.largest in legal[max(0, legal.index(best) - 1) : legal.index(best) + 1]


@given(
    **MACHINES,
    inflation=INFLATION,
)
def test_a_climb_whose_peaks_are_far_too_high_does_not_mislead(rank_rows, fixed, per_row, limit, inflation):
    """Smaller sizes that ran before leave their fragments: up to 30% more than a size takes by itself, so that the line is wrong, and sizes
    that fit run out of memory."""

    def memory(rows: int) -> int:
        return fixed + per_row * rows

    found = search(rank_rows, memory, limit, lambda rows: int(memory(rows) * inflation[rows % 16]))
    best, legal = truth(rank_rows, memory, limit), legal_rows(rank_rows)
    assert found.probes <= MAX_PROBES
    assert found.largest == best
    assert best == legal[-1] or found.exact


@given(
    **MACHINES,
    inflation=INFLATION,
    at_the_limit=st.booleans(),
)
def test_a_size_at_the_limit_that_fails_by_chance_costs_itself_only(rank_rows, fixed, per_row, limit, inflation, at_the_limit):
    """The largest size that fits at times runs out of memory at others: it or the next smaller is found."""

    def memory(rows: int) -> int:
        return fixed + per_row * rows

    best, legal = truth(rank_rows, memory, limit), legal_rows(rank_rows)

    def noisy(rows: int) -> int:
        return limit + 1 if rows == best and at_the_limit else memory(rows)

    found = search(rank_rows, noisy, limit, lambda rows: int(noisy(rows) * inflation[rows % 16]))
    assert found.probes <= MAX_PROBES
    assert best is None or (found.largest or legal[0]) in legal[max(0, legal.index(best) - 1) : legal.index(best) + 1]


@given(
    **MACHINES,
    noise=st.lists(st.floats(0.95, 1.05), min_size=16, max_size=16),
)
def test_where_a_larger_size_may_take_less_the_next_larger_one_is_still_seen_to_fail(rank_rows, fixed, per_row, limit, noise):
    def memory(rows: int) -> int:
        return int((fixed + per_row * rows) * noise[rows % 16])

    found, legal = search(rank_rows, memory, limit), legal_rows(rank_rows)
    assert found.probes <= MAX_PROBES and found.exact
    if memory(legal[0]) > limit:
        assert found.largest is None
    else:
        assert found.largest is not None and memory(found.largest) <= limit
        above = next((rows for rows in legal if rows > found.largest), None)
        assert above is None or memory(above) > limit


def test_a_size_that_fails_by_chance_does_not_hide_the_larger_one_that_fits():
    """As seen at ZeRO 3: by itself 12 rows took more memory than 16, whose logits are mappings of their own."""
    peak = {1: 450, 2: 460, 3: 465, 4: 475, 6: 495, 8: 520, 12: 575, 16: 555, 24: 620, 48: 800}
    found = search(48, peak.__getitem__, 560)
    assert (found.largest, sorted(found.failed)) == (16, [12, 24])
    assert found.exact and found.probes == 4


def test_gaps_between_legal_sizes():
    """97 rows are shared out as ones or not at all."""
    assert search(97, lambda rows: 100 + rows, 190).largest == 1
    assert search(97, lambda rows: 100 + rows, 197).largest == 97
    assert search(97, lambda rows: 100 + rows, 197, lambda rows: 1000).largest == 97


def test_everything_fits():
    found = search(120, lambda rows: 100 + rows, 1000)
    assert (found.largest, found.failed, found.probes, found.exact) == (120, {}, 1, True)


def test_the_example_of_the_module_holds():
    found = search(48, lambda rows: int((0.6 + 0.775 * rows) * GIB), 10 * GIB)
    assert (found.largest, sorted(found.peaks), list(found.failed)) == (12, [1, 2, 4, 8, 12], [16])
    assert found.probes == 3


def test_nothing_fits():
    found = search(8, lambda rows: 2 * GIB, GIB)
    assert (found.largest, list(found.failed), found.probes, found.exact) == (None, [1], 1, True)
    assert within_margin(found, 0.02) is None


def test_of_one_size_the_later_probe_counts():
    found = Search(legal_rows(8)).after({1: 5, 2: 6, 4: 8}, {}, 10).after({}, {4: "while it was timed"}, 10)
    assert (found.largest, list(found.failed), found.exact) == (2, [4], True)


def test_what_fails_after_smaller_sizes_is_tried_by_itself():
    found = Search(legal_rows(8)).after({1: 50, 2: 60}, {4: "out of memory"}, 80)
    assert (found.largest, found.failed, found.exact) == (2, {}, False)
    assert found.next_sizes() == (4,)


def test_the_first_probe_climbs_and_ends_with_the_whole_rank():
    assert climb(legal_rows(48)) == (1, 2, 4, 8, 16, 48)
    assert climb(legal_rows(1)) == (1,)
    assert climb(legal_rows(7)) == (1, 7)


def test_peaks_hidden_by_the_start_up_do_not_bend_the_line():
    line = fit_line({1: 1000, 2: 1000, 4: 1400, 8: 2200})
    assert line is not None
    assert line.at(16) == pytest.approx(3800, rel=0.1)
    assert fit_line({1: 1000, 2: 1000, 4: 1000}) is None


def test_too_little_to_spare_takes_the_next_smaller_legal_size():
    found = Search(legal_rows(8), peaks={2: 90, 4: 99}, limit_bytes=100)
    assert within_margin(found, 0.02) == 2
    assert within_margin(found, 0.005) == 4
    assert within_margin(Search(legal_rows(8), peaks={1: 99}, limit_bytes=100), 0.02) == 1
    # The next smaller one has failed: it takes no less.
    assert within_margin(Search(legal_rows(8), peaks={1: 90, 4: 99}, failed={2: "by chance"}, limit_bytes=100), 0.02) == 4
