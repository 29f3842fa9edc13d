"""The search finds the largest micro-batch that fits, in at most five probes, also where memory is no straight line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.train.tune.memory_model import MAX_PROBES, Search, climb, fit_line, legal_rows, within_margin, worth_trying

GIB = 1 << 30


def search(rank_rows: int, memory, limit_bytes: int) -> Search:
    """The search on a machine where a size takes `memory(rows)`."""
    found = Search(legal_rows(rank_rows), limit_bytes=limit_bytes)
    while sizes := found.next_sizes():
        peaks, failed = {}, {}
        for rows in sizes:
            if not worth_trying(peaks, rows, limit_bytes):
                break
            if memory(rows) > limit_bytes:
                failed[rows] = "out of memory"
                break
            peaks[rows] = memory(rows)
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


def test_nothing_fits():
    found = search(8, lambda rows: 2 * GIB, GIB)
    assert (found.largest, found.smallest_failed, found.probes, found.exact) == (None, 1, 1, True)
    assert within_margin(found, 0.02) is None


def test_a_size_that_fails_once_does_not_fit_whatever_was_seen_before():
    found = Search(legal_rows(8)).after({1: 5, 2: 6, 4: 8}, {}, 10).after({}, {4: "while it was timed"}, 10)
    assert (found.largest, found.smallest_failed) == (2, 4)


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
