"""Files -> slices, the units of reading, packing and caching. Pure, and lazy: a slice is computed from its number, so a source may have
10^9 of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Format = Literal["text", "jsonl", "parquet"]
Compression = Literal["gzip", "zstd"]

MIN_SLICE_BYTES = 4096
MIN_SLICES_PER_SOURCE = 8  # a source with fewer (one compressed file, say) is cut into stripes of records
SLICES_PER_CORPUS = 64  # small corpora are cut finer than data.slice_bytes, so that windows still mix and some can be held out
# A slice's documents are packed by themselves, so that its rows can be cached; with so many rows, its last one, which may be part empty,
# is nothing. 4 bytes of text are a token, about.
ROWS_PER_SLICE, BYTES_PER_TOKEN = 256, 4
COMPRESSION_RATIO = 3  # of text with gzip or zstd, about
# A compressed file cannot be entered in the middle. One that holds more text than this is cut into stripes of records, each of which
# unpacks the whole file: more work, for bounded memory.
STRIPE_TEXT_BYTES, MAX_STRIPES = 32 << 20, 64


@dataclass(frozen=True)
class SourceFile:
    source: str
    uri: str  # as a person would open it: /data/a.jsonl or s3://bucket/a.jsonl
    path: str  # the same inside its filesystem
    size_bytes: int
    version: str  # ETag where the store has one, else the modification time in ns
    format: Format
    compression: Compression | None = None
    row_group_bytes: tuple[int, ...] = ()  # parquet: size of each row group, in order, before compression

    @property
    def text_bytes(self) -> int:
        """What it holds before compression, about."""
        if self.format == "parquet":
            return sum(self.row_group_bytes)
        return self.size_bytes * (COMPRESSION_RATIO if self.compression else 1)


@dataclass(frozen=True)
class Slice:
    """What one read covers. One of: several whole files (`start` and `stop` are 0); bytes [start, stop) of one plain text or JSONL file,
    where a line belongs to the slice in which it begins; row groups [start, stop) of one Parquet file; one whole compressed file.

    With `num_stripes` > 1 it is only those of its records whose number within it (0, 1, ...) is `stripe` modulo `num_stripes`.
    """

    source: str
    files: tuple[SourceFile, ...]
    start: int
    stop: int
    size_bytes: int  # what it is estimated to hold, before compression
    stripe: int = 0
    num_stripes: int = 1


@dataclass(frozen=True)
class _Part:
    """Consecutive slices of a source, cut alike: pieces of one file, or one slice of several files, each in `num_stripes` stripes."""

    first: int  # number of its first slice
    files: tuple[SourceFile, ...]
    num_pieces: int
    cuts: tuple[int, ...] = ()  # of a Parquet file: the first row group of each piece, and the end
    num_stripes: int = 1

    @property
    def end(self) -> int:
        return self.first + self.num_pieces * self.num_stripes

    def slice(self, number: int) -> Slice:
        piece, stripe = divmod(number - self.first, self.num_stripes)
        file = self.files[0]
        if self.cuts:
            start, stop = self.cuts[piece], self.cuts[piece + 1]
            size = sum(file.row_group_bytes[start:stop])
        elif self.num_pieces > 1:
            start, stop = (file.size_bytes * i // self.num_pieces for i in (piece, piece + 1))
            size = stop - start
        else:
            whole = len(file.row_group_bytes) if file.format == "parquet" else file.size_bytes
            start, stop = 0, whole if len(self.files) == 1 else 0
            size = sum(each.text_bytes for each in self.files)
        return Slice(file.source, self.files, start, stop, size // self.num_stripes, stripe, self.num_stripes)


@dataclass(frozen=True)
class SourceSlices(Sequence[Slice]):
    """The slices of one source, in file order. Memory follows the number of files, not of slices."""

    name: str
    parts: tuple[_Part, ...]

    def __len__(self) -> int:
        return self.parts[-1].end if self.parts else 0

    def __getitem__(self, number: int) -> Slice:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.parts[bisect_right(self.parts, number, key=lambda part: part.first) - 1].slice(number)

    @property
    def text_bytes(self) -> int:
        return sum({file.uri: file.text_bytes for part in self.parts for file in part.files}.values())


def slice_bytes_for(asked: int, seq_len: int, corpus_bytes: int) -> int:
    """How much text a slice of the corpus holds: `asked`, or more where ROWS_PER_SLICE rows need it, or less where the corpus is small.

    Example: seq_len 256, a corpus of 24 MB, 1 MiB asked -> 24 MB / 64 = 375 kB, which is 366 rows.
    """
    enough = ROWS_PER_SLICE * (seq_len + 1) * BYTES_PER_TOKEN
    fine = min(asked, corpus_bytes // SLICES_PER_CORPUS)
    return max(MIN_SLICE_BYTES, fine, min(enough, corpus_bytes // MIN_SLICES_PER_SOURCE))


def plan_slices(name: str, files: Sequence[SourceFile], slice_bytes: int) -> SourceSlices:
    """The slices of one source; pure.

    - Consecutive files that hold no more than `slice_bytes` of text together are read together.
    - A larger one of plain text or JSONL is cut into equal byte ranges of at most that; one of Parquet into runs of row groups that stay
      within it, of at least one group; a compressed one into stripes of at most STRIPE_TEXT_BYTES.

    With fewer than MIN_SLICES_PER_SOURCE slices, each becomes ceil(MIN / n) stripes, so that there is something to mix.
    Example: files of 10, 3, 4 and 9 MiB, slice_bytes = 8 MiB -> 0..5 and 5..10 of the first, the two small ones
    together, 0..4.5 and 4.5..9 of the last: 5 slices, hence 2 stripes of each, 10 in all.
    """
    parts: list[_Part] = []
    group: list[SourceFile] = []

    def add(files: Sequence[SourceFile], num_pieces: int = 1, cuts: tuple[int, ...] = (), num_stripes: int = 1) -> None:
        parts.append(_Part(parts[-1].end if parts else 0, tuple(files), num_pieces, cuts, num_stripes))

    def close_group() -> None:
        if group:
            add(group)
            group.clear()

    held = 0
    for file in files:
        if held + file.text_bytes > slice_bytes:
            close_group()
            held = 0
        if file.text_bytes <= slice_bytes:
            group.append(file)
            held += file.text_bytes
        elif file.format == "parquet":
            cuts = tuple(_row_group_cuts(file.row_group_bytes, slice_bytes))
            add([file], len(cuts) - 1, cuts)
        elif file.compression is not None:
            stripe_bytes = max(slice_bytes, STRIPE_TEXT_BYTES)
            add([file], num_stripes=min(MAX_STRIPES, -(-file.text_bytes // stripe_bytes)))
        else:
            add([file], -(-file.size_bytes // slice_bytes))
    close_group()
    found = SourceSlices(name, tuple(parts))
    if len(found) >= MIN_SLICES_PER_SOURCE or not parts:
        return found
    k = -(-MIN_SLICES_PER_SOURCE // len(found))
    return SourceSlices(name, tuple(replace(p, first=p.first * k, num_stripes=p.num_stripes * k) for p in parts))


def _row_group_cuts(row_group_bytes: Sequence[int], slice_bytes: int) -> Iterator[int]:
    """0, the first row group of every further slice, and the number of row groups."""
    size = 0
    yield 0
    for i, each in enumerate(row_group_bytes):
        if size and size + each > slice_bytes:
            yield i
            size = 0
        size += each
    yield len(row_group_bytes)
