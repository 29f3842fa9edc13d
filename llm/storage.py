"""Where a URI becomes a filesystem: disks and S3 behind one set of calls, and one error that says what is wrong.

A URI is a local path (absolute, relative to the working directory, or file://) or s3://bucket/key. Listing is in
`llm/file_listing.py`; connections to S3, and what its errors mean, in `llm/s3.py`.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from llm.config import S3Section
from llm.errors import StorageError
from llm.retry import ShortReadError, patiently
from llm.s3 import explain_s3, s3_client, s3_filesystem, without_noise

S3_PREFIX = "s3://"


def open_storage(uri: str, s3: S3Section, patient: bool = True) -> tuple[pafs.FileSystem, str]:
    """The filesystem that holds `uri`, and the path inside it. Does not look whether that path exists. With `patient=False` its calls are
    tried once: for those who try again themselves.

    The first call for an S3 endpoint tries to connect to it, so that a wrong one fails within `s3.connect_timeout_s`
    and not after all retries. Raises StorageError for another scheme, a URI without a bucket, or an endpoint that
    cannot be reached.
    """
    if not is_s3(uri):
        return pafs.LocalFileSystem(), local_path(uri)
    bucket, key = split_s3(uri)
    with storage_errors(uri, s3):
        filesystem = s3_filesystem(bucket, s3, patient)
    return filesystem, f"{bucket}/{key}" if key else bucket


def is_s3(uri: str) -> bool:
    return uri.startswith(S3_PREFIX)


def local_path(uri: str) -> str:
    """The absolute path of a local URI, symbolic links kept. Raises StorageError for a scheme that is not supported."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return os.path.abspath(Path(uri).expanduser())  # noqa: PTH100 (Path.resolve would follow links)
    if scheme != "file":
        raise StorageError(f"{uri}: {scheme}:// is not supported. Legal: a local path, file:///path or s3://bucket/key.")
    if not rest.startswith("/"):
        raise StorageError(f"{uri}: a file URI needs an absolute path. Nearest legal form: file:///{rest}")
    return unquote(rest)


def split_s3(uri: str) -> tuple[str, str]:
    """(bucket, key); the key may be empty. Raises StorageError when there is no bucket."""
    bucket, _, key = uri.removeprefix(S3_PREFIX).partition("/")
    if not bucket:
        raise StorageError(f"{uri}: names no bucket. Legal form: s3://bucket/key.")
    return bucket, key


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts added: join("s3://b/runs/", "a", "b.json") == "s3://b/runs/a/b.json"."""
    joined = "/".join(part.strip("/") for part in parts if part.strip("/"))
    return f"{uri.rstrip('/')}/{joined}" if joined else uri


def read_bytes(uri: str, s3: S3Section) -> bytes:
    """All of a file, as stored, at its full length: what was cut short is read again. Raises StorageError."""
    filesystem, path = open_storage(uri, s3, patient=False)
    with storage_errors(uri, s3):
        return patiently(partial(_whole, filesystem, path))


def read_bytes_or_none(uri: str, s3: S3Section) -> bytes | None:
    """`read_bytes`; None where there is no such file."""
    filesystem, path = open_storage(uri, s3, patient=False)
    with storage_errors(uri, s3):
        try:
            return patiently(partial(_whole, filesystem, path))
        except FileNotFoundError:
            return None


def write_bytes(uri: str, data: bytes | pa.Buffer, s3: S3Section, *, durable: bool = True) -> None:
    """Creates or replaces a file as one act: a reader sees the old bytes or the new, never a part. Makes folders. What is `durable` is on
    the disk when this returns."""
    filesystem, path = open_storage(uri, s3)

    def attempt() -> None:
        with filesystem.open_output_stream(path, compression=None) as stream:  # else a name in .zst would be compressed twice
            stream.write(data)

    with storage_errors(uri, s3, doing="write"):
        if is_s3(uri):
            patiently(attempt)  # pyarrow tries single requests again, and gives up the upload at a connection that was reset
        else:
            _write_local(Path(path), data, durable)


def exists(uri: str, s3: S3Section) -> bool:
    """Whether there is a file or folder. A bucket that does not exist is a StorageError: a wrong address."""
    filesystem, path = open_storage(uri, s3)
    with storage_errors(uri, s3):
        found = filesystem.get_file_info(path).type != pafs.FileType.NotFound
        if not found and is_s3(uri):
            s3_client(s3).list_objects_v2(Bucket=split_s3(uri)[0], MaxKeys=1)
        return found


@contextmanager
def storage_errors(uri: str, s3: S3Section, doing: str = "read") -> Iterator[None]:
    """Turns what the system, pyarrow and boto3 raise inside into a StorageError: the URI, the cause, the nearest fix.

    `doing` is the verb for the message: read, write, list. The original is not chained: it tells a user nothing more.
    """
    try:
        yield
        return
    except ShortReadError as error:
        raise StorageError(f"{uri}: cannot {doing}: {error}") from None
    except (OSError, pa.ArrowException) as error:
        caught: Exception = error
    except Exception as error:  # botocore's errors share no base with OSError, and importing it costs 0.3 s
        if not type(error).__module__.startswith("botocore"):
            raise
        caught = error
    why = explain_s3(caught, split_s3(uri)[0], s3) if is_s3(uri) else _explain_local(caught)
    raise StorageError(f"{uri}: cannot {doing}: {why}") from None


def _whole(filesystem: pafs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_file(path) as stream:
        data, size = stream.read(), stream.size()
    if len(data) != size:
        raise ShortReadError(f"only {len(data)} of {size} bytes came")
    return data


def _explain_local(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in _LOCAL_FIXES:
        return f"{os.strerror(number)}. {_LOCAL_FIXES[number]}"
    return os.strerror(number) if number else without_noise(error)


_LOCAL_FIXES = {
    errno.ENOENT: "Check the spelling, and that every node mounts it",
    errno.EACCES: "Give this user the right to it, or name another place",
    errno.EPERM: "Give this user the right to it, or name another place",
    errno.ENOSPC: "Free some space, or name a larger disk",
    errno.EDQUOT: "Free some space, or name a larger disk",
    errno.EROFS: "Name a place that can be written",
    errno.EISDIR: "Name a file",
    errno.ENOTDIR: "A part of the path is a file: name a folder",
}


def _write_local(path: Path, data: bytes | pa.Buffer, durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
