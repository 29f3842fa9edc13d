"""Slices and windows, from files to rows. A slice: read -> clean -> tokenize -> pack. A window: a few slices' rows, shuffled together.

Both are pure functions of the recipe and their number. Whoever asks for window 11 of epoch 0, on whatever node and after whatever restart,
gets the same rows in the same order. Ray is not needed: evaluation, provenance and tests call them directly.

Slices, not windows, are packed and cached: what a slice's rows are depends on no seed, weight or epoch, so every epoch, restart and sweep
trial shares them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from llm.config import CleanSection, S3Section
from llm.data.clean import Cleaner
from llm.data.encode import Encoder, Engine
from llm.data.order import CorpusPlan, Cursor
from llm.data.pack import Rows, joined, narrowest, no_rows, pack, refilled, shuffle_order
from llm.data.records import BadRecord, Document, read_slice
from llm.data.slices import Slice
from llm.state import COUNTED
from llm.tokenizer import Tokenizer

TOKENIZE_DOCUMENTS, TOKENIZE_CHARS = 256, 1 << 20  # given to the tokenizer at once: enough to amortize the call, little enough for memory


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a window's rows, but for the files' bytes."""

    plan: CorpusPlan
    tokenizer: Tokenizer
    engine: Engine
    seq_len: int
    clean: CleanSection
    text_fields: dict[str, str]  # by source
    s3: S3Section


class _Place(NamedTuple):
    uri: str
    position: int


@dataclass(frozen=True)
class Provenance:
    """Where documents come from, by number: `uris[of_uri[n]]` and the place in it (as in `Document.position`)."""

    uris: tuple[str, ...] = ()
    of_uri: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    position: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.position)

    def of(self, document: int) -> tuple[str, int]:
        return self.uris[self.of_uri[document]], int(self.position[document])

    @staticmethod
    def of_documents(documents: Sequence[_Place]) -> Provenance:
        number = {uri: i for i, uri in enumerate(dict.fromkeys(document.uri for document in documents))}
        return Provenance(
            tuple(number),
            np.array([number[document.uri] for document in documents], dtype=np.int32),
            np.array([document.position for document in documents], dtype=np.int64),
        )

    @staticmethod
    def joined(parts: Sequence[Provenance]) -> Provenance:
        before = np.cumsum([0, *(len(part.uris) for part in parts)])
        return Provenance(
            tuple(uri for part in parts for uri in part.uris),
            np.concatenate([part.of_uri + shift for part, shift in zip(parts, before, strict=False)]).astype(np.int32),
            np.concatenate([part.position for part in parts]),
        )


@dataclass(frozen=True)
class Packed:
    """Rows, which documents are in them, and what became of the records that were read for them."""

    rows: Rows
    documents: Provenance
    counts: Counter[str]  # by COUNTED in llm/state.py
    bad: tuple[BadRecord, ...]


def make_window(
    recipe: Recipe, epoch: int, window: int, began: Sequence[int] = (), slice_rows: Callable[[Recipe, Slice], Packed] | None = None
) -> Packed:
    """A window in its final order. `slice_rows` makes a slice's rows: `make_slice`, or the token cache's."""
    parts = [(slice_rows or make_slice)(recipe, piece) for piece in recipe.plan.window(epoch, window, began)]
    rows = refilled(joined([part.rows for part in parts], [len(part.documents) for part in parts]), recipe.tokenizer.eos_id)
    order = shuffle_order(len(rows), (recipe.plan.seed, epoch, window))
    return Packed(
        rows.taken(order),
        Provenance.joined([part.documents for part in parts]),
        sum((part.counts for part in parts), Counter()),
        tuple(record for part in parts for record in part.bad),
    )


def with_empty_windows(
    counts: np.ndarray,
    position: np.ndarray,
    windows_per_epoch: int,
    begin: Callable[[], tuple[Recipe, Cursor]],
    slice_rows: Callable[[Recipe, Slice], Packed] | None = None,
) -> np.ndarray:
    """The counts (int64, by COUNTED) of rows of the stream, with those of windows that gave no row, all their records being bad or short,
    added to the first row of the next window that did.

    `position`: (epoch, window, offset) of the rows, which follow one another. Where a window is missing between two rows, it was empty, and
    is made once more; so is the one before the first row, where that begins a window: nothing here tells whether it was. `begin` gives the
    recipe, and the cursor from which the pass over the stream began: windows before it were counted before. It is called only then.
    """
    numbers = position[:, 0] * windows_per_epoch + position[:, 1]
    firsts = np.flatnonzero(position[:, 2] == 0)
    before = np.where(firsts > 0, numbers[firsts - 1], -1)
    firsts = firsts[before != numbers[firsts] - 1]
    if not len(firsts):
        return counts
    recipe, cursor = begin()
    began_with = cursor.epoch * windows_per_epoch + cursor.window
    counts = counts.copy()
    for first in firsts.tolist():
        known = int(numbers[first - 1]) if first else began_with - 1
        for number in range(int(numbers[first]) - 1, known, -1):
            packed = make_window(recipe, *divmod(number, windows_per_epoch), cursor.began, slice_rows)
            if len(packed.rows):
                break
            counts[first] += [packed.counts[name] for name in COUNTED]
    return counts


def make_slice(recipe: Recipe, piece: Slice) -> Packed:
    """A slice's rows, packed, in no particular order."""
    texts = _Texts(recipe, piece)
    rows = _packed(recipe, texts)
    return Packed(rows, Provenance.of_documents(texts.documents), texts.counts(), tuple(texts.bad))


def held_out_rows(recipe: Recipe, piece: Slice, num_rows: int) -> Packed:
    """`num_rows` rows of the beginning of a held-out slice; fewer, if it holds no more."""
    texts = _Texts(recipe, piece)
    rows = _packed(recipe, texts, num_rows * (recipe.seq_len + 1))
    order = shuffle_order(len(rows), (recipe.plan.seed,))[:num_rows]
    return Packed(rows.taken(order), Provenance.of_documents(texts.documents), texts.counts(), tuple(texts.bad))


def sample_texts(clean: CleanSection, pieces: Iterable[Slice], text_fields: dict[str, str], s3: S3Section, max_chars: int) -> list[str]:
    """Cleaned texts of the slices, up to `max_chars` in total."""
    cleaner, found = Cleaner(clean), []
    for piece in pieces:
        for record in read_slice(piece, text_fields[piece.source], s3):
            if isinstance(record, Document) and (text := cleaner.clean(record.text)):
                found.append(text[:max_chars])
                max_chars -= len(found[-1])
            if max_chars <= 0:
                return found
    return found


def _packed(recipe: Recipe, texts: _Texts, enough_tokens: int | None = None) -> Rows:
    encoder = _encoder(recipe.tokenizer, recipe.engine)
    kind = np.dtype(narrowest(recipe.tokenizer.vocab_size))
    tokens = bytearray()  # grows in place, where joining arrays would hold all of them twice
    lengths: list[np.ndarray] = []
    open_tokens = 0  # of a document that goes on
    enough_bytes = None if enough_tokens is None else enough_tokens * kind.itemsize
    while (enough_bytes is None or len(tokens) < enough_bytes) and (batch := texts.next_batch()):
        ids, sizes = encoder.encode([text for text, _ in batch])
        ids, sizes, open_tokens = _by_document(ids, sizes, np.array([is_last for _, is_last in batch]), open_tokens)
        tokens += ids.astype(kind).data
        lengths.append(sizes)
    if open_tokens:
        lengths.append(np.array([open_tokens]))
    if not tokens:
        return no_rows(recipe.seq_len, kind.type)
    return pack(np.frombuffer(tokens, kind), np.concatenate(lengths), recipe.seq_len, recipe.tokenizer.eos_id)


def _by_document(ids: np.ndarray, sizes: np.ndarray, is_last: np.ndarray, open_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids, tokens of each document that ends here, tokens of the one that does not), from those of pieces, each with its end-of-document
    id, which only the last piece of a document keeps; `open_tokens` is what the first document had before."""
    if is_last.all() and not open_tokens:
        return ids, sizes, 0
    ids = np.delete(ids, (np.cumsum(sizes) - 1)[~is_last])
    ends = np.concatenate([[0], np.cumsum(sizes - ~is_last)[is_last]])
    open_here = len(ids) - int(ends[-1])
    sizes = np.diff(ends)
    if not len(sizes):
        return ids, sizes, open_tokens + open_here
    sizes[0] += open_tokens
    return ids, sizes, open_here


_Piece = tuple[str, bool]  # a text, or a piece of one; whether it is its last


class _Texts:
    """The cleaned texts of a slice, batch by batch; notes where each is from, and what was left out."""

    def __init__(self, recipe: Recipe, piece: Slice) -> None:
        self.documents: list[_Place] = []
        self.bad: list[BadRecord] = []
        self._records = 0
        self._cleaner = Cleaner(recipe.clean)
        self._texts = self._read(recipe, piece)

    def next_batch(self) -> list[_Piece]:
        batch: list[_Piece] = []
        chars = 0
        for piece in islice(self._texts, TOKENIZE_DOCUMENTS):
            batch.append(piece)
            chars += len(piece[0])
            if chars >= TOKENIZE_CHARS:
                break
        return batch

    def counts(self) -> Counter[str]:
        return Counter({"records": self._records, "bad": len(self.bad), **self._cleaner.counts})

    def _read(self, recipe: Recipe, piece: Slice) -> Iterator[_Piece]:
        for record in read_slice(piece, recipe.text_fields[piece.source], recipe.s3):
            self._records += 1
            if isinstance(record, BadRecord):
                self.bad.append(record)
                continue
            place = _Place(record.uri, record.position)
            if record.rest:
                cleaned = self._cleaner.clean_pieces(chain([record.text], record.rest))
            else:
                cleaned = iter([text] if (text := self._cleaner.clean(record.text)) else [])
            del record  # and with it the text as it was
            text = next(cleaned, None)
            if text is not None:
                self.documents.append(place)
                for following in cleaned:
                    yield text, False
                    text = following
                yield text, True


@lru_cache(maxsize=2)
def _encoder(tokenizer: Tokenizer, engine: Engine) -> Encoder:
    """One a process: building it takes 10 ms and more, and it learns as it goes."""
    return Encoder(tokenizer, engine)
