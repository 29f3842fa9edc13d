"""The token cache: a slice's packed rows as one Arrow file, named by the hash of everything that determines them.

Files are written once, each by one atomic act, and read by every epoch, restart and sweep trial, whatever its seed, weights and layout;
two writers of one file write the same bytes. A damaged file is made anew. When the folder outgrows its limit, the files that were not read
for the longest time go.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSelector, FileType

from llm.config import RunConfig, S3Section
from llm.data.pack import Rows, narrowest
from llm.data.records import BadRecord
from llm.data.slices import BYTES_PER_TOKEN, Slice
from llm.data.window import Packed, Provenance, Recipe, make_slice
from llm.errors import ConfigError
from llm.storage import is_s3, join, local_path, open_storage, read_bytes_or_none, storage_errors, write_bytes

FORMAT = 3  # raise it when the same slice would be packed into other rows
EVICT_TO_FRAC = 0.9
CHECKS_PER_LIMIT = 20  # a process looks at the folder's size whenever it has written this fraction of the limit


class TokenCache:
    """`slice` is `make_slice`, remembered in the folder `uri`, local or s3://, of at most `max_bytes`."""

    def __init__(self, uri: str, s3: S3Section, max_bytes: float) -> None:
        self.uri, self.s3, self.max_bytes = uri, s3, max_bytes
        self._written_bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenCache, (self.uri, self.s3, self.max_bytes)

    def slice(self, recipe: Recipe, piece: Slice) -> Packed:
        uri = self.file_of(recipe, piece)
        found = self._read(uri, recipe.seq_len)
        if found is None:
            found = make_slice(recipe, piece)
            self._write(uri, found)
        return found

    def file_of(self, recipe: Recipe, piece: Slice) -> str:
        key = slice_key(recipe, piece)
        return join(self.uri, key[:2], f"{key}.arrow")

    def evict(self) -> int:
        """Removes what was not used for the longest time, where the folder is over its limit; returns the bytes that are left."""
        filesystem, path = open_storage(self.uri, self.s3)
        with storage_errors(self.uri, self.s3, doing="clear"):
            found = filesystem.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
            files = sorted((info for info in found if info.type == FileType.File), key=lambda info: info.mtime_ns)
            total = sum(info.size for info in files)
            if total <= self.max_bytes:
                return total
            for info in files:
                if total <= EVICT_TO_FRAC * self.max_bytes:
                    break
                with contextlib.suppress(FileNotFoundError):  # another process clears too
                    filesystem.delete_file(info.path)
                total -= info.size
        return total

    def _read(self, uri: str, seq_len: int) -> Packed | None:
        """None where it is not there, or damaged as it stands: what a connection cuts short is read again. Raises StorageError."""
        data = read_bytes_or_none(uri, self.s3) if is_s3(uri) else None
        if data is None and is_s3(uri):
            return None
        try:
            with pa.BufferReader(data) if data is not None else pa.memory_map(uri) as source:
                found = _from_arrow(pa.ipc.open_file(source).read_all(), seq_len)
            if not is_s3(uri):
                os.utime(uri)  # it was used now
            return found
        except (pa.ArrowException, OSError, ValueError, KeyError):
            return None

    def _write(self, uri: str, packed: Packed) -> None:
        table = _to_arrow(packed)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue()
        write_bytes(uri, data, self.s3, durable=False)
        self._written_bytes += data.size
        if self._written_bytes * CHECKS_PER_LIMIT > self.max_bytes:
            self._written_bytes = 0
            self.evict()


def token_cache(config: RunConfig) -> TokenCache | None:
    """The cache that the run uses; None where it uses none. A local one is in a folder of this machine's, by its absolute path."""
    cache = config.data.cache
    if not cache.enabled:
        return None
    uri = cache.uri or join(config.run.storage, "cache", "tokens")
    return TokenCache(uri if is_s3(uri) else local_path(uri), config.s3, cache.max_gib * (1 << 30))


def require_room(cache: TokenCache, recipe: Recipe) -> None:
    """Raises ConfigError where the corpus, packed, is larger than the cache may grow."""
    text_bytes = sum(source.text_bytes for source in recipe.plan.sources)
    needed = text_bytes / BYTES_PER_TOKEN * np.dtype(narrowest(recipe.tokenizer.vocab_size)).itemsize
    if needed > cache.max_bytes:
        gib = 1 << 30
        raise ConfigError(
            f"the tokens of {text_bytes / gib:.1f} GiB of text take about {needed / gib:.1f} GiB, more than "
            f"data.cache.max_gib={cache.max_bytes / gib:g}. Nearest legal value: {needed / gib + 1:.0f}"
        )


def slice_key(recipe: Recipe, piece: Slice) -> str:
    """SHA-256 of what determines a slice's rows: the files' identity, the part of them, cleaning, tokenizer, row length."""
    determines = {
        "format": FORMAT,
        "files": [(file.uri, file.size_bytes, file.version) for file in piece.files],
        "part": (piece.start, piece.stop, piece.stripe, piece.num_stripes),
        "text_field": recipe.text_fields[piece.source],
        "clean": recipe.clean.model_dump(),
        "tokenizer": recipe.tokenizer.fingerprint,
        "seq_len": recipe.seq_len,
    }
    return hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()


_COUNTS, _ROWS, _CRC = b"counts", b"rows", b"crc32"


def _to_arrow(packed: Packed) -> pa.Table:
    """One row of lists, one for each array, so that each is read in place."""
    bad = [asdict(record) for record in packed.bad]
    arrays: dict[str, Any] = {
        "ids": packed.rows.ids.ravel(),
        "pieces": packed.rows.pieces.ravel(),
        "uris": list(packed.documents.uris),
        "of_uri": packed.documents.of_uri,
        "position": packed.documents.position,
        **{f"bad_{name}": [record[name] for record in bad] for name in ("uri", "position", "reason")},
    }
    types = {"uris": pa.string(), "bad_uri": pa.string(), "bad_position": pa.int64(), "bad_reason": pa.string()}
    columns = {}
    for name, values in arrays.items():
        flat = pa.array(values, types.get(name))
        columns[name] = pa.LargeListArray.from_arrays(pa.array([0, len(flat)], pa.int64()), flat)
    metadata = {_COUNTS: json.dumps(packed.counts), _ROWS: str(len(packed.rows)), _CRC: str(_crc(packed.rows))}
    return pa.table(columns).replace_schema_metadata(metadata)


def _from_arrow(table: pa.Table, seq_len: int) -> Packed:
    """Raises ValueError where the bytes are not those that were written."""
    flat = {name: table.column(name).chunk(0).values for name in table.column_names}
    metadata = table.schema.metadata
    num_rows = int(metadata[_ROWS])
    rows = Rows(flat["ids"].to_numpy().reshape(num_rows, seq_len + 1), flat["pieces"].to_numpy().reshape(-1, 5))
    if _crc(rows) != int(metadata[_CRC]):
        raise ValueError("its checksum is another")
    uris = tuple(flat["uris"].to_pylist())
    bad = zip(flat["bad_uri"].to_pylist(), flat["bad_position"].to_pylist(), flat["bad_reason"].to_pylist(), strict=True)
    return Packed(
        rows,
        Provenance(uris, flat["of_uri"].to_numpy(), flat["position"].to_numpy()),
        Counter(json.loads(metadata[_COUNTS])),
        tuple(BadRecord(*record) for record in bad),
    )


def _crc(rows: Rows) -> int:
    ids, pieces = (np.ascontiguousarray(each).data for each in (rows.ids, rows.pieces))
    return zlib.crc32(pieces, zlib.crc32(ids))
