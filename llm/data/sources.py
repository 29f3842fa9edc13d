"""Which files a source names. Listing goes through `llm.file_listing` and reads the footers of Parquet files.

How files are cut into slices is in `llm/data/slices.py`; what a slice holds is read by `llm/data/records.py`.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from llm.config import S3Section, SourceSection
from llm.data.exact_file import ExactFile
from llm.data.records import is_io_error
from llm.data.slices import Compression, Format, SourceFile
from llm.errors import DataError, StorageError
from llm.file_listing import find_files, nearest_uri
from llm.storage import is_s3, storage_errors

_FOOTER_THREADS = 16

_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_KNOWN = f"{' '.join(_FORMATS)}, and each but .parquet with {' or '.join(_COMPRESSIONS)} behind it"


def list_files(source: SourceSection, s3: S3Section) -> list[SourceFile]:
    """The files of a source, sorted by URI: those with a known extension, neither hidden nor empty. At least one.

    Reads the footer of each Parquet file; one without rows counts as empty. Raises DataError when the source names
    nothing, nothing readable, or Parquet files without the text column; StorageError when its bucket or folder cannot
    be listed. `source.uri` must not be "builtin".
    """
    found = find_files(source.uri, s3)
    files = []
    for file in found:
        kind = _kind(file.path)
        if kind is not None and file.size_bytes > 0:
            if not is_s3(file.uri) and not os.access(file.path, os.R_OK):
                raise StorageError(f"{file.uri}: cannot read: Permission denied. Give this user the right to it, or name other files")
            files.append(SourceFile(source.name, file.uri, file.path, file.size_bytes, file.version, *kind))
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        files = list(pool.map(lambda file: _with_row_groups(file, source.text_field, s3), files))
    files = [file for file in files if file.format != "parquet" or file.row_group_bytes]
    if files:
        return files
    where = f"data.sources: source {source.name!r}, uri={source.uri}"
    if found:
        names = ", ".join(file.uri.rpartition("/")[2] for file in found[:3])
        more = ", ..." if len(found) > 3 else ""
        raise DataError(
            f"{where}: {len(found)} files ({names}{more}), but all are empty or have no known extension.\n  Known extensions: {_KNOWN}"
        )
    near = nearest_uri(source.uri, s3)
    hint = f"Nearest existing name: {near}. " if near else ""
    raise DataError(f"{where}: no such file, folder or match.\n  {hint}Known extensions: {_KNOWN}")


def _kind(path: str) -> tuple[Format, Compression | None] | None:
    name = path.rpartition("/")[2].lower()
    stem, dot, last = name.rpartition(".")
    compression = _COMPRESSIONS.get(dot + last)
    if compression is not None:
        _, dot, last = stem.rpartition(".")
    kind = _FORMATS.get(dot + last)
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def _with_row_groups(file: SourceFile, text_field: str, s3: S3Section) -> SourceFile:
    if file.format != "parquet":
        return file
    with storage_errors(file.uri, s3), ExactFile(file.uri, file.size_bytes, file.version, s3) as stream:
        try:
            footer = pq.read_metadata(stream.for_arrow)
            schema = footer.schema.to_arrow_schema()
        except (pa.ArrowException, OSError) as error:
            if is_io_error(error):
                raise
            stream.check_unchanged()
            why = str(error).splitlines()[0]
            raise DataError(f"{file.uri}: not a readable Parquet file: {why}. Write it again, or remove it.") from None
    texts = [field.name for field in schema if _is_text(field.type)]
    if text_field not in texts:
        what = f"is {schema.field(text_field).type}, not text" if text_field in schema.names else "is not in it"
        raise DataError(
            f"{file.uri}: column text_field={text_field!r} {what}. Its columns: {', '.join(schema.names)}.\n"
            f"  Legal values of text_field for source {file.source!r}: {', '.join(texts) or 'none'}"
        )
    groups = [footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)] if footer.num_rows else []
    return replace(file, row_group_bytes=tuple(groups))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)) or (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind)  # older writers did not mark strings as text
    )
