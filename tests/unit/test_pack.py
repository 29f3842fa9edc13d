"""Packing loses no token, invents none, and pads only the end of a window."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llm.data.pack import pack, shuffled

EOS = 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 50), max_size=40), max_size=30)


@given(DOCUMENTS, st.integers(1, 12))
def test_every_token_is_in_the_rows_once_in_order(documents, seq_len):
    rows = pack(documents, seq_len, EOS)
    line = rows.ids[rows.segments > 0].tolist()
    assert line == [token for document in documents for token in [*document, EOS]]
    assert rows.real_tokens() == len(line)


@given(DOCUMENTS, st.integers(1, 12))
def test_only_the_last_row_is_padded_and_only_at_its_end(documents, seq_len):
    segments = pack(documents, seq_len, EOS).segments
    assert (segments[:-1] > 0).all()
    if len(segments):
        last = segments[-1] > 0
        assert last[0] and (np.diff(last.astype(int)) <= 0).all()


@given(DOCUMENTS, st.integers(1, 12))
def test_segments_number_the_documents_of_a_row_from_one(documents, seq_len):
    rows = pack(documents, seq_len, EOS)
    for ids, segments in zip(rows.ids, rows.segments, strict=True):
        real = segments[segments > 0]
        assert real[0] == 1
        steps = np.diff(real)
        assert set(steps.tolist()) <= {0, 1}
        ends = ids[: len(real)][:-1] == EOS
        assert (steps[ends] == 1).all() and (steps[~ends] == 0).all()


def test_waste_is_under_half_a_percent_in_a_window_of_ordinary_size():
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 50, int(n)).tolist() for n in rng.integers(1, 2000, 300)]
    rows = pack(documents, 256, EOS)
    assert rows.real_tokens() / rows.ids.size >= 0.995


def test_the_example_of_the_docstring():
    rows = pack([[5, 6], [7, 8, 9, 4]], 4, EOS)
    assert rows.ids.tolist() == [[5, 6, 0, 7, 8], [9, 4, 0, 0, 0]]
    assert rows.segments.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]]


def test_shuffling_keeps_the_rows_and_follows_the_seed():
    rows = pack([[i] * 3 for i in range(1, 60)], 3, EOS)
    one, same, other = shuffled(rows, (0, 1, 2)), shuffled(rows, (0, 1, 2)), shuffled(rows, (0, 1, 3))
    assert (one.ids == same.ids).all() and (one.segments == same.segments).all()
    assert (one.ids != other.ids).any()
    assert sorted(one.ids.tolist()) == sorted(rows.ids.tolist())
