"""One window, from files to rows: read -> clean -> tokenize -> pack -> shuffle. A pure function of the recipe and the window's number.

Whoever asks for window 11 of epoch 0, on whatever node and after whatever restart, gets the same rows in the same order. Ray is not
needed: evaluation and tests call it directly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from llm.config import CleanSection, S3Section
from llm.data.clean import Cleaner
from llm.data.order import CorpusPlan, Slice
from llm.data.pack import Rows, pack, shuffled
from llm.data.records import BadRecord, read_slice
from llm.tokenizer import Tokenizer

TOKENIZE_DOCUMENTS = 256  # documents given to the tokenizer at once: enough to amortize the call, little enough to bound memory


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a window's rows, but for the files' bytes."""

    plan: CorpusPlan
    tokenizer: Tokenizer
    seq_len: int
    clean: CleanSection
    text_fields: dict[str, str]  # by source
    s3: S3Section


@dataclass
class WindowCounts:
    """Records of one window: `records` = documents packed + dropped by cleaning + `len(bad)`."""

    records: int = 0
    cleaning: dict[str, int] = field(default_factory=dict)
    bad: list[BadRecord] = field(default_factory=list)


def make_window(recipe: Recipe, epoch: int, index: int) -> tuple[Rows, WindowCounts]:
    """The rows of a window in their final order, and what became of its records."""
    counts = WindowCounts()
    documents = list(token_documents(recipe, recipe.plan.window(epoch, index), counts))
    rows = pack(documents, recipe.seq_len, recipe.tokenizer.eos_id)
    return shuffled(rows, (recipe.plan.seed, epoch, index)), counts


def held_out_rows(recipe: Recipe, slices: Iterable[Slice], num_rows: int, counts: WindowCounts) -> Rows:
    """The first `num_rows` rows (fewer, if there is no more text) packed from held-out slices; `counts` is filled along the way."""
    documents: list[list[int]] = []
    needed = num_rows * (recipe.seq_len + 1)
    for document in token_documents(recipe, slices, counts):
        documents.append(document)
        needed -= len(document) + 1
        if needed <= 0:
            break
    rows = pack(documents, recipe.seq_len, recipe.tokenizer.eos_id)
    return Rows(rows.ids[:num_rows], rows.segments[:num_rows])


def token_documents(recipe: Recipe, slices: Iterable[Slice], counts: WindowCounts) -> Iterator[list[int]]:
    """The token ids of each document of the slices, without the end-of-document token; `counts` is filled along the way."""
    encoder = recipe.tokenizer.build()
    cleaner = Cleaner(recipe.clean)
    texts = _texts(recipe, slices, counts, cleaner)
    while batch := list(islice(texts, TOKENIZE_DOCUMENTS)):
        for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False):
            yield encoding.ids
    counts.cleaning = dict(cleaner.counts)


def _texts(recipe: Recipe, slices: Iterable[Slice], counts: WindowCounts, cleaner: Cleaner) -> Iterator[str]:
    for piece in slices:
        for record in read_slice(piece, recipe.text_fields[piece.source], recipe.s3):
            counts.records += 1
            if isinstance(record, BadRecord):
                counts.bad.append(record)
            elif text := cleaner.clean(record.text):
                yield text
