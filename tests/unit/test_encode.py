"""Encoding in batches and pieces: no text is lost, no token lands in another document, and both engines agree."""

from __future__ import annotations

import numpy as np
import pytest

from llm.data import encode
from llm.data.encode import Encoder
from llm.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(iter(["some words of text, and more of them: été 日本\n" * 50]), vocab_size=400)
TEXTS = ["", "short", "a line\n" * 40, "words " * 50, "x" * 333, "日本" * 99, "", " " * 200 + "end", "last"]


@pytest.mark.parametrize("piece_chars", [1 << 17, 64, 7])
@pytest.mark.parametrize("batch_chars", [1 << 17, 50, 1])
def test_texts_come_back_whole_from_pieces_and_batches(piece_chars: int, batch_chars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE_CHARS", piece_chars)
    monkeypatch.setattr(encode, "BATCH_CHARS", {"gigatoken": batch_chars, "tokenizers": batch_chars})
    ids, lengths = Encoder(TOKENIZER, "tokenizers").encode(TEXTS)
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    assert all(document[-1] == TOKENIZER.eos_id for document in documents) and lengths.sum() == len(ids)
    assert [TOKENIZER.build().decode(document[:-1].tolist()) for document in documents] == TEXTS
    fast_ids, fast_lengths = Encoder(TOKENIZER, "gigatoken").encode(TEXTS)
    assert np.array_equal(ids, fast_ids) and np.array_equal(lengths, fast_lengths)
    assert [len(each) for each in Encoder(TOKENIZER, "tokenizers").encode([])] == [0, 0]


def test_a_cut_at_a_line_or_word_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "some words of text, and more of them: été 日本\n" * 50
    whole, _ = Encoder(TOKENIZER, "tokenizers").encode([text])
    for piece_chars in (200, 30):
        monkeypatch.setattr(encode, "PIECE_CHARS", piece_chars)
        assert np.array_equal(Encoder(TOKENIZER, "tokenizers").encode([text])[0], whole)
