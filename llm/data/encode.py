"""Texts -> token ids, many at once, by the fastest tokenizer that gives the right ids.

The tokenizers library says which ids are right. gigatoken gives the same at 10 to 100 times its speed for the byte-level and
SentencePiece-style BPE tokenizers that it knows; `fastest` compares the two on a sample of the run's own text before a run relies on it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from llm.tokenizer import TOKENIZER_JSON, Tokenizer

Engine = Literal["gigatoken", "tokenizers"]

# The tokenizers library takes 140 bytes a character. A longer text is cut into pieces that are encoded by themselves: at the end
# of a line, where that changes no id, else of a word.
PIECE_CHARS, LINES_TRIED = 1 << 17, 1000
BATCH_CHARS: dict[Engine, int] = {"gigatoken": 1 << 20, "tokenizers": 1 << 17}  # encoded at once, a piece more or less

# What tokenizers get wrong first: special tokens spelt out, empty text, runs, marks that combine, scripts, emoji, controls, code.
_HARD_TEXTS = (
    "",
    " ",
    "a" * 2000,
    "  \n\n\t x  \r\n y ",
    "don't I'LL we've 3.14 1234567890 ١٢٣ ½",
    "naïve cafe\u0301 Straße ﬁ İstanbul",
    "日本語のテキスト 한국어 ไทย हिन्दी עברית العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \u200b\u200d\ufeff\x00\x1b",
    'def f(x):\n    return {"a": x**2, **kw}  # <|im_start|> </s> <s> [CLS] <unk>',
)


# awkward's modules import each other: two threads that load it at once may each see half of it.
_LOADING = threading.Lock()


class Encoder:
    """Encodes without special tokens: a document that quotes "<|endoftext|>" does not end there."""

    def __init__(self, tokenizer: Tokenizer, engine: Engine) -> None:
        self._eos_id = tokenizer.eos_id
        self._fast: Any = None
        if engine == "gigatoken":
            self._fast = _gigatoken(tokenizer)
        if self._fast is None:  # also on a node that lacks it: the ids are the same
            self._slow = tokenizer.build()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts one after the other, each ended by the end-of-document id, int32; how many each has, int64)."""
        number_of_pieces: list[int] = []

        def pieces() -> Iterator[str]:
            for text in texts:
                number_of_pieces.append(0)
                for piece in _pieces(text):
                    number_of_pieces[-1] += 1
                    yield piece

        found = [self._tokens(batch) for batch in _batches(pieces(), BATCH_CHARS["tokenizers" if self._fast is None else "gigatoken"])]
        if not found:
            return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        tokens = np.concatenate([ids for ids, _ in found])
        first = np.cumsum([0, *number_of_pieces])[:-1]
        lengths = np.add.reduceat(np.concatenate([sizes for _, sizes in found]), first)
        ended = np.full(len(tokens) + len(lengths), self._eos_id, dtype=np.int32)
        is_token = np.ones(len(ended), dtype=np.bool_)
        is_token[np.cumsum(lengths + 1) - 1] = False
        ended[is_token] = tokens
        return ended, lengths + 1

    def _tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._fast is not None:
            import awkward  # `_gigatoken` has loaded it

            found = self._fast.encode_batch(texts, parallel=False)
            return np.asarray(awkward.flatten(found, axis=1)), np.asarray(awkward.num(found, axis=1))
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in self._slow.encode_batch_fast(texts, add_special_tokens=False)]
        return np.concatenate(ids), np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = _cut(text, start + 1, start + PIECE_CHARS)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _cut(text: str, first: int, latest: int) -> int:
    """Before a line that is not indented, if there is one near: tokens do not span that place. Else before a word, else at the latest."""
    line = latest
    for _ in range(LINES_TRIED):
        line = text.rfind("\n", first, line)
        if line < 0:
            break
        if not text[line + 1].isspace() and not text[line - 1].isspace():
            return line + 1
    word = text.rfind(" ", first, latest)
    return word if word > 0 else latest


def _batches(pieces: Iterator[str], enough_chars: int) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece)
        if chars >= enough_chars:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def fastest(tokenizer: Tokenizer, sample: Sequence[str]) -> Engine:
    """The engine to use: gigatoken where it is there, knows this kind of tokenizer and gives the same ids on the sample."""
    if _gigatoken(tokenizer) is None:
        return "tokenizers"
    specials = [str(token["content"]) for token in _content(tokenizer).get("added_tokens") or []]
    texts = [*sample, *_HARD_TEXTS, " ".join(specials), "x".join(specials)]
    right, fast = Encoder(tokenizer, "tokenizers"), Encoder(tokenizer, "gigatoken")
    try:
        same = all(np.array_equal(a, b) for a, b in zip(right.encode(texts), fast.encode(texts), strict=True))
    except Exception:  # whatever it cannot do, the other can
        same = False
    return "gigatoken" if same else "tokenizers"


def _gigatoken(tokenizer: Tokenizer) -> Any:
    """gigatoken's tokenizer, or None where the package is missing or refuses this one."""
    try:
        with _LOADING:
            import awkward  # noqa: F401  # gigatoken answers in its arrays, and imports it only then
            import gigatoken

        content = _content(tokenizer)
        # Left out, special tokens are spelt like any other text.
        content["added_tokens"] = [token for token in content.get("added_tokens") or [] if not token.get("special")]
        content |= {"truncation": None, "padding": None}
        return gigatoken.Tokenizer.from_json(json.dumps(content))
    except Exception:  # it raises many kinds for what it does not know
        return None


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.files[TOKENIZER_JSON].decode("utf-8-sig"))
