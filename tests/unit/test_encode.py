"""The fast tokenizer is used where it gives the right ids, and only there; long texts are encoded in pieces, and nothing is lost."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from llm.data import encode
from llm.data.encode import Encoder, fastest
from llm.tokenizer import TOKENIZER_JSON, Tokenizer, train_tokenizer

TEXTS = [f"The wheel no. {i} turns; it's {i * 7} years old.\n    def grind(corn): return 'é' * {i}\n" for i in range(300)]
HARD = ["", "a <|endoftext|> b", "x" * 5000, "日本語 👩‍👩‍👧 e\u0301", "\x00\x01", " lead", "trail "]


def trained(kind: str) -> Tokenizer:
    return train_tokenizer(iter(TEXTS), kind, 400)  # pyright: ignore[reportArgumentType]


def test_bpe_is_encoded_by_the_fast_engine_with_the_same_ids() -> None:
    tokenizer = trained("bpe")
    assert fastest(tokenizer, TEXTS) == "gigatoken"
    for texts in (TEXTS, HARD, []):
        right, fast = (Encoder(tokenizer, engine).encode(texts) for engine in ("tokenizers", "gigatoken"))
        for a, b in zip(right, fast, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "wordlevel"])
def test_every_other_kind_has_the_right_ids_whatever_the_engine(kind: str) -> None:
    tokenizer = trained(kind)
    chosen = Encoder(tokenizer, fastest(tokenizer, TEXTS)).encode(TEXTS + HARD)
    right = tokenizer.build()
    expected = [[*e.ids, tokenizer.eos_id] for e in right.encode_batch_fast(TEXTS + HARD, add_special_tokens=False)]
    assert chosen[0].tolist() == [token for ids in expected for token in ids]
    assert chosen[1].tolist() == [len(ids) for ids in expected]


def test_an_engine_that_differs_by_one_id_is_not_used(monkeypatch) -> None:
    tokenizer = trained("bpe")
    content = json.loads(tokenizer.files[TOKENIZER_JSON])
    content["model"]["merges"] = content["model"]["merges"][:-1]
    other = replace(tokenizer, files={**tokenizer.files, TOKENIZER_JSON: json.dumps(content).encode()})
    real = encode._gigatoken
    monkeypatch.setattr(encode, "_gigatoken", lambda given: real(other))
    assert fastest(tokenizer, TEXTS) == "tokenizers"


def test_a_node_without_the_fast_engine_gives_the_same_ids(monkeypatch) -> None:
    tokenizer = trained("bpe")
    expected = Encoder(tokenizer, "gigatoken").encode(TEXTS)
    monkeypatch.setattr(encode, "_gigatoken", lambda given: None)
    assert fastest(tokenizer, TEXTS) == "tokenizers"
    np.testing.assert_array_equal(Encoder(tokenizer, "gigatoken").encode(TEXTS)[0], expected[0])


PIECES_TOKENIZER = train_tokenizer(iter(["some words of text, and more of them: été 日本\n" * 50]), vocab_size=400)
PIECES = ["", "short", "a line\n" * 40, "words " * 50, "x" * 333, "日本" * 99, "", " " * 200 + "end", "last"]


@pytest.mark.parametrize("piece_chars", [1 << 17, 64, 7])
@pytest.mark.parametrize("batch_chars", [1 << 17, 50, 1])
def test_texts_come_back_whole_from_pieces_and_batches(piece_chars: int, batch_chars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE_CHARS", piece_chars)
    monkeypatch.setattr(encode, "BATCH_CHARS", {"gigatoken": batch_chars, "tokenizers": batch_chars})
    ids, lengths = Encoder(PIECES_TOKENIZER, "tokenizers").encode(PIECES)
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    assert all(document[-1] == PIECES_TOKENIZER.eos_id for document in documents) and lengths.sum() == len(ids)
    assert [PIECES_TOKENIZER.build().decode(document[:-1].tolist()) for document in documents] == PIECES
    fast_ids, fast_lengths = Encoder(PIECES_TOKENIZER, "gigatoken").encode(PIECES)
    assert np.array_equal(ids, fast_ids) and np.array_equal(lengths, fast_lengths)
    assert [len(each) for each in Encoder(PIECES_TOKENIZER, "tokenizers").encode([])] == [0, 0]


def test_a_cut_at_a_line_or_word_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "some words of text, and more of them: été 日本\n" * 50
    whole, _ = Encoder(PIECES_TOKENIZER, "tokenizers").encode([text])
    for piece_chars in (200, 30):
        monkeypatch.setattr(encode, "PIECE_CHARS", piece_chars)
        assert np.array_equal(Encoder(PIECES_TOKENIZER, "tokenizers").encode([text])[0], whole)
