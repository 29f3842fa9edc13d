"""What a slice holds: its documents, from text, JSONL and Parquet, compressed or not.

A record that cannot be used is yielded as a `BadRecord` and counted by the caller, never raised: one broken line must not stop a run of a
week. A file that cannot be read at all is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llm.config import S3Section
from llm.data.exact_file import ExactFile
from llm.data.long_text import LongRecord, pieces
from llm.data.slices import Slice, SourceFile
from llm.data.unpack import DamagedStreamError, unpacked
from llm.storage import storage_errors

# A longer line is skipped without being held in memory. One of 48 MiB takes itself, and twice its tokens, at most: with
# 2 bytes a token, that is less than 256 MB more than short ones take, even where each byte is a token.
MAX_LINE_BYTES = 48 << 20
# What is longer than this is decoded, cleaned and tokenized piece by piece (`llm/data/long_text.py`): all at once, that takes up to a dozen
# copies, of 4 bytes a character. What JSON holds besides its long strings must be shorter: it takes up to 100 bytes for each list.
MAX_WHOLE_BYTES = 4 << 20
MAX_VALUE_BYTES = 16 << 20  # of Parquet: pyarrow holds a value four times
MAX_JSON_NODES = 1_000_000  # lists and objects in one line, or brackets in its text
COMPRESSED_TEXT_BYTES = 1 << 20  # a compressed text file that unpacks to more becomes several documents of about this size
_CHUNK_BYTES = 4 << 20
_TAIL_BYTES = 64 << 10  # read at a time beyond a slice's end, to finish its last line
_PARQUET_BATCH_ROWS, _PARQUET_BATCH_BYTES = 256, 8 << 20  # whichever is less


@dataclass(frozen=True, slots=True)
class Document:
    text: str  # of more than MAX_WHOLE_BYTES: its first piece
    uri: str
    position: int  # byte offset in plain text and JSONL, line (from 1) in compressed JSONL, row (from 0) in Parquet
    rest: Iterable[str] = ()  # the text's other pieces, to be read once


@dataclass(frozen=True, slots=True)
class BadRecord:
    uri: str
    position: int  # as in Document; where a file is damaged, the place from which nothing could be read
    reason: str


class _Raw(NamedTuple):
    """A record before it is parsed: bytes of a text or of a JSON line, a Parquet scalar, or what is wrong with it."""

    uri: str
    position: int
    value: Any
    is_json: bool = False
    bad: str | None = None


Line = tuple[int, int, bytes | bytearray | None]  # offset; number, from 1, of those that were split together; None where it is too long

_TOO_LONG = f"a line of more than {MAX_LINE_BYTES >> 20} MiB"
_TOO_LONG_VALUE = f"a value of more than {MAX_VALUE_BYTES >> 20} MiB"


class _NoTextError(Exception):
    """The record can be read, but not used; the text says why."""


def read_slice(piece: Slice, text_field: str, s3: S3Section) -> Iterator[Document | BadRecord]:
    """The documents of a slice in file order, with a BadRecord in the place of each that is unusable.

    Records, bad ones included, are numbered 0, 1, ... within the slice; blank lines are no records. With stripes only
    every `num_stripes`-th is parsed, but all are read. Where a file is damaged, what stands before the damage is
    yielded, then one BadRecord for the rest; so with a compressed stream that is a bomb: once it has unpacked to
    too much (`llm/data/unpack.py`), it is given up. A text file is one document; a
    byte range of one, or each COMPRESSED_TEXT_BYTES of a compressed one, is a document of whole lines. Memory: a few
    chunks of 4 MiB and the longest line, twice while it is put together, or the row groups of a Parquet slice.

    Raises StorageError when a file cannot be opened or the connection stays lost, DataError when it changed since it was
    listed.
    """
    for number, raw in enumerate(raw for file in piece.files for raw in _read_file(file, piece, text_field, s3)):
        if number % piece.num_stripes == piece.stripe:
            yield _parse(raw, text_field)


def _read_file(file: SourceFile, piece: Slice, text_field: str, s3: S3Section) -> Iterator[_Raw]:
    with storage_errors(file.uri, s3), ExactFile(file.uri, file.size_bytes, file.version, s3) as stream:
        alone = len(piece.files) == 1
        if file.format == "parquet":
            groups = range(piece.start, piece.stop) if alone else range(len(file.row_group_bytes))
            yield from _parquet_rows(file, stream, groups, text_field)
        elif file.compression is not None:
            yield from _compressed_records(file, stream)
        else:
            start, stop = (piece.start, piece.stop) if alone else (0, file.size_bytes)
            lines = _lines_between(stream, start, stop, file.format == "jsonl")
            yield from _one_text(file, lines) if file.format == "text" else _json_lines(file, lines)


def _parse(raw: _Raw, text_field: str) -> Document | BadRecord:
    uri, position, value, is_json, bad = raw
    if bad is not None:
        return BadRecord(uri, position, bad)
    try:
        data = value.as_py() if isinstance(value, pa.Scalar) else value
        if isinstance(data, bytes | bytearray | memoryview) and len(data) > MAX_WHOLE_BYTES:
            return _parse_long(uri, position, data, is_json, text_field)
        text: Any = data.decode() if isinstance(data, bytes) else data
        if is_json:
            _check_nodes(text)
            return Document(_text_in(json.loads(text.removeprefix("\ufeff")), text_field), uri, position)
        return Document(_string(text, text_field), uri, position)
    except _NoTextError as error:
        return BadRecord(uri, position, str(error))
    except UnicodeDecodeError as error:
        return BadRecord(uri, position, f"not UTF-8 (byte {error.start}: {error.reason})")
    except RecursionError:
        return BadRecord(uri, position, "JSON nested too deeply")
    except ValueError as error:
        return BadRecord(uri, position, f"not JSON: {error}")


def _parse_long(uri: str, position: int, data: Any, is_json: bool, text_field: str) -> Document:
    """Before a piece is used, all of them are looked at. Raises what `_parse` takes for a bad record."""
    if is_json:
        record = LongRecord(data, MAX_WHOLE_BYTES)
        _check_nodes(record.rest)
        text = record.pieces_of(_text_in(record.parsed(), text_field))
    else:
        for _ in pieces(data, 0, len(data)):
            pass
        text = pieces(data, 0, len(data))
    return Document(next(text, ""), uri, position, text)


def _text_in(record: Any, text_field: str) -> str:
    if not isinstance(record, dict):
        raise _NoTextError(f"a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        raise _NoTextError(f"no field {text_field!r}")
    return _string(record[text_field], text_field)


def _string(found: Any, text_field: str) -> str:
    if not isinstance(found, str):
        raise _NoTextError(f"field {text_field!r} is {'null' if found is None else type(found).__name__}, not a string")
    return found


def _check_nodes(text: str) -> None:
    if len(text) > MAX_JSON_NODES and text.count("[") + text.count("{") > MAX_JSON_NODES:
        raise _NoTextError(f"JSON of more than {MAX_JSON_NODES} lists and objects")


def _one_text(file: SourceFile, lines: Iterable[Line]) -> Iterator[_Raw]:
    first, parts = -1, []
    for offset, _, line in lines:
        first = offset if first < 0 else first
        if line is None:
            yield _Raw(file.uri, first, None, bad=_TOO_LONG)
            return
        parts.append(line)
    if parts:
        yield _Raw(file.uri, first, b"".join(parts))


def _json_lines(file: SourceFile, lines: Iterable[Line]) -> Iterator[_Raw]:
    for position, _, line in lines:
        if line is None:
            yield _Raw(file.uri, position, None, bad=_TOO_LONG)
        elif not line.isspace():
            yield _Raw(file.uri, position, line, is_json=True)


def _compressed_records(file: SourceFile, stream: ExactFile) -> Iterator[_Raw]:
    """JSONL: one record a line, at its number. Text: pieces of whole lines, each at its offset in the unpacked text."""
    assert file.compression is not None
    number, start, end = 0, 0, 0
    parts: list[bytes | bytearray] = []
    bad: str | None = None
    try:
        for offset, number, line in _split_lines(unpacked(stream, file.compression, _CHUNK_BYTES), 0, skip_empty=file.format == "jsonl"):
            if file.format == "jsonl":
                yield from _json_lines(file, [(number, number, line)])
                continue
            if line is None:
                bad = _TOO_LONG
                break
            parts.append(line)
            end = offset + len(line)
            if end - start >= COMPRESSED_TEXT_BYTES:
                yield _Raw(file.uri, start, b"".join(parts))
                parts, start = [], end
    except DamagedStreamError as damage:
        bad = str(damage)
    if parts:
        yield _Raw(file.uri, start, b"".join(parts))
    if bad is not None:
        yield _Raw(file.uri, number + 1 if file.format == "jsonl" else end, None, bad=bad)


def _lines_between(stream: ExactFile, start: int, stop: int, skip_empty: bool) -> Iterator[Line]:
    """The lines that begin in bytes [start, stop), each at 0 or after a newline."""
    position = max(start - 1, 0)
    chunks = _chunks(stream, position, stop)
    if start > 0:
        for chunk in chunks:
            at = chunk.find(b"\n")
            if at >= 0:
                position += at + 1
                chunks = chain([chunk[at + 1 :]], chunks)
                break
            position += len(chunk)
            if position >= stop:
                return
    yield from _split_lines(chunks, position, stop, skip_empty)


def _chunks(stream: ExactFile, position: int, stop: int) -> Iterator[bytes]:
    stream.seek(position)
    tail_bytes = _TAIL_BYTES
    while chunk := stream.read(min(_CHUNK_BYTES, stop - position) if position < stop else tail_bytes):
        if position >= stop:
            tail_bytes = min(2 * tail_bytes, _CHUNK_BYTES)
        position += len(chunk)
        yield chunk


def _split_lines(chunks: Iterable[bytes], offset: int, stop: int | None = None, skip_empty: bool = False) -> Iterator[Line]:
    """The lines that begin before `stop`, with their newlines; the last may lack it. Empty ones are only counted where they are skipped.

    `offset` is where the chunks begin, which is where a line begins.
    """
    number = 0
    held = bytearray()  # the beginning of a line that no chunk has ended yet; it grows in place
    held_bytes = 0  # its length, also when it is too long to be held
    for chunk in chunks:
        lines = chunk.split(b"\n")
        last = lines.pop()
        for line in lines:
            if stop is not None and offset >= stop:
                return
            number += 1
            if skip_empty and not line and not held_bytes:
                offset += 1
                continue
            line_bytes = held_bytes + len(line) + 1
            if not held_bytes:
                whole = line + b"\n" if line_bytes <= MAX_LINE_BYTES else None
            else:
                held += line
                held += b"\n"
                whole, held, held_bytes = _whole_line(held, line_bytes), bytearray(), 0
            yield offset, number, whole
            del whole  # before the next one is read
            offset += line_bytes
        if not last:
            continue
        held_bytes += len(last)
        if held_bytes <= MAX_LINE_BYTES:
            held += last
        else:
            held = bytearray()
            if stop is not None and offset + held_bytes >= stop:
                break  # no other line begins in this range: do not look for the end of this one
    if held_bytes and (stop is None or offset < stop):
        yield offset, number + 1, _whole_line(held, held_bytes)


def _whole_line(line: bytearray, line_bytes: int) -> bytes | bytearray | None:
    """None where it is too long. A long one is not copied."""
    if line_bytes > MAX_LINE_BYTES:
        return None
    return line if line_bytes > MAX_WHOLE_BYTES else bytes(line)


def _parquet_rows(file: SourceFile, stream: ExactFile, groups: range, text_field: str) -> Iterator[_Raw]:
    row = 0
    try:
        table = pq.ParquetFile(stream.for_arrow, pre_buffer=True)
        row = sum(table.metadata.row_group(i).num_rows for i in range(groups.start))
        rows = sum(table.metadata.row_group(i).num_rows for i in groups)
        row_bytes = sum(file.row_group_bytes[groups.start : groups.stop]) // max(rows, 1)
        batch_rows = max(1, min(_PARQUET_BATCH_ROWS, _PARQUET_BATCH_BYTES // max(row_bytes, 1)))
        for batch in table.iter_batches(batch_rows, list(groups), [text_field], use_threads=False):
            short = batch.column(0).nbytes <= MAX_WHOLE_BYTES
            for scalar in batch.column(0):
                value = scalar if short else _short_or_view(scalar)
                yield _Raw(file.uri, row, value, bad=_TOO_LONG_VALUE if value is None else None)
                row += 1
        stream.check_unchanged()
    except (pa.ArrowException, OSError) as error:
        if is_io_error(error):
            raise
        stream.check_unchanged()
        yield _Raw(file.uri, row, None, bad=f"damaged Parquet file: {str(error).splitlines()[0]}")


def _short_or_view(scalar: Any) -> Any:
    """A long value as its bytes in place; None for one that is too long."""
    value = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
    buffer = value.as_buffer() if scalar.is_valid else None
    if buffer is None or buffer.size <= MAX_WHOLE_BYTES:
        return scalar
    return memoryview(buffer) if buffer.size <= MAX_VALUE_BYTES else None


def is_io_error(error: Exception) -> bool:
    """pyarrow raises OSError for a damaged page as for a lost connection; only the latter has a number or names AWS."""
    return isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error))
