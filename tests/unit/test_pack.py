"""Packing loses no token, invents none, cuts few documents and pads next to nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.data import pack as packing
from llm.data.pack import COLUMN, DOCUMENT, LENGTH, OFFSET, ROW, Rows, joined, no_rows, pack, refilled, shuffle_order

EOS = 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 50), max_size=40), min_size=1, max_size=30)


def packed(documents: list[list[int]], seq_len: int) -> Rows:
    tokens = np.array([token for document in documents for token in [*document, EOS]], dtype=np.int32)
    return pack(tokens, [len(document) + 1 for document in documents], seq_len, EOS)


def check(rows: Rows, documents: list[list[int]]) -> None:
    """Every token of every document lies where `pieces` says, once, in rows without holes."""
    found = [np.full(len(document) + 1, -1) for document in documents]
    for row, column, document, offset, length in rows.pieces:
        assert length > 0 and (found[document][offset : offset + length] == -1).all()
        found[document][offset : offset + length] = rows.ids[row, column : column + length]
    assert [each.tolist() for each in found] == [[*document, EOS] for document in documents]
    segments = rows.segments()
    for row in range(len(rows)):
        mine = rows.pieces[rows.pieces[:, ROW] == row]
        assert mine[:, COLUMN].tolist() == (np.cumsum(mine[:, LENGTH]) - mine[:, LENGTH]).tolist()
        expected = [number for number, piece in enumerate(mine, 1) for _ in range(piece[LENGTH])]
        assert segments[row].tolist() == expected + [0] * (rows.ids.shape[1] - len(expected))
        assert (rows.ids[row, len(expected) :] == EOS).all()


@given(DOCUMENTS, st.integers(1, 12))
def test_every_token_is_in_the_rows_once(documents, seq_len):
    rows = packed(documents, seq_len)
    check(rows, documents)
    assert len(rows) <= -(-rows.filled.sum() // (seq_len + 1)) + 1


@given(DOCUMENTS, DOCUMENTS, st.integers(1, 12))
def test_joined_and_refilled_parts_are_as_good(one, other, seq_len):
    rows = refilled(joined([packed(one, seq_len), packed(other, seq_len)], [len(one), len(other)]), EOS)
    check(rows, one + other)


@pytest.mark.parametrize(("lengths", "seq_len"), [
    ((1, 2000), 256), ((1, 2000), 1024), ((600, 601), 999), ((501, 502), 1000), ((1, 12), 64), ((20_000, 90_000), 512),
])  # fmt: skip
def test_at_least_997_of_1000_positions_are_real(lengths, seq_len):
    rng = np.random.default_rng(0)
    sizes = rng.integers(*lengths, size=max(20, 600_000 // lengths[1]))
    rows = pack(np.ones(sizes.sum(), dtype=np.int32), sizes, seq_len, EOS)
    assert rows.filled.sum() == sizes.sum()
    assert rows.filled.sum() / rows.ids.size >= 0.997


def test_documents_that_fit_are_seldom_cut():
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 500, 3000)
    rows = pack(np.ones(sizes.sum(), dtype=np.int32), sizes, 1023, EOS)
    assert (np.bincount(rows.pieces[:, DOCUMENT]) > 1).mean() < 0.02


def test_the_example_of_the_docstring():
    rows = packed([[5, 6], [7, 8, 9, 4, 3, 2], [1]], 4)
    assert rows.ids.tolist() == [[7, 8, 9, 4, 3], [5, 6, 0, 2, 0], [1, 0, 0, 0, 0]]
    assert rows.segments().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    assert rows.pieces[:, OFFSET].tolist() == [0, 0, 5, 0]


def test_taken_rows_keep_their_pieces():
    documents = [[i] * (i % 7 + 1) for i in range(1, 60)]
    rows = packed(documents, 7)
    order = shuffle_order(len(rows), (0, 1, 2))
    assert order.tolist() == shuffle_order(len(rows), (0, 1, 2)).tolist() != shuffle_order(len(rows), (0, 1, 3)).tolist()
    check(rows.taken(order), documents)
    assert (rows.taken(order).ids == rows.ids[order]).all()
    assert len(rows.taken(order[:3])) == 3


def test_no_rows_are_rows_too():
    assert len(no_rows(8)) == 0 and no_rows(8).segments().shape == (0, 9)


@given(DOCUMENTS, st.integers(1, 12), st.integers(1, 30))
def test_rows_are_the_same_in_blocks(documents, seq_len, block):
    whole = packed(documents, seq_len)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_TOKENS", block)
        assert np.array_equal(packed(documents, seq_len).ids, whole.ids)
