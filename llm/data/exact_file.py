"""A file of known size and version, read to the byte: a truncated read is never its end, and no other file is taken for it."""

from __future__ import annotations

import errno
import io
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from llm.config import S3Section
from llm.errors import DataError
from llm.retry import ShortReadError, patiently
from llm.s3 import s3_once
from llm.storage import is_s3, local_path, split_s3, storage_errors


class ExactFile(io.RawIOBase):
    """One file for reading and seeking. `read(n)` gives `n` bytes, or those up to `size_bytes`, never fewer, and only of the `version` that
    was listed: the ETag on S3, the modification time in ns on a disk.

    S3 is asked for the bytes of that version only (If-Match). A local file's size and time are looked at when it is opened and after each
    read. After an error that may pass, a stall or a short read, it goes on from that byte, on the file opened anew (see `llm/retry.py`);
    what it has is kept. Nothing is opened before the first read. Raises StorageError, with the place and the cause, when that did not help;
    DataError when the file has another size or version.
    """

    def __init__(self, uri: str, size_bytes: int, version: str, s3: S3Section) -> None:
        self.uri, self.size_bytes, self.version = uri, size_bytes, version
        self._s3 = s3
        self._at = 0
        self._file: pa.NativeFile | None = None

    @property
    def for_arrow(self) -> Any:
        """What pyarrow reads Parquet from. For a local file pyarrow's own, which is faster: no network can cut its reads short. Call
        `check_unchanged` where it fails, and when it is done."""
        if is_s3(self.uri):
            return self
        with storage_errors(self.uri, self._s3):
            return patiently(self._opened)

    def check_unchanged(self) -> None:
        """Raises DataError when a local file is no longer the one that was listed. (On S3 each read made sure of that.)"""
        if not is_s3(self.uri):
            with storage_errors(self.uri, self._s3):
                self._check_local()

    def read(self, size: int | None = -1) -> bytes:
        left = max(self.size_bytes - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        parts: list[bytes] = []

        def attempt() -> None:
            missing = wanted - sum(map(len, parts))
            offset = self._at + wanted - missing
            data = self._s3_bytes(missing, offset) if is_s3(self.uri) else self._local_bytes(missing, offset)
            parts.append(data)
            if len(data) < missing:
                self._reopen()
                raise ShortReadError(f"only {sum(map(len, parts))} bytes came")

        if wanted:
            with storage_errors(self.uri, self._s3, doing=f"read {wanted} bytes at {self._at} of {self.size_bytes}"):
                patiently(attempt)
        self._at += wanted
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size_bytes}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._reopen()
        super().close()

    def _s3_bytes(self, size: int, offset: int) -> bytes:
        bucket, key = split_s3(self.uri)
        wanted = {"Range": f"bytes={offset}-{offset + size - 1}", "IfMatch": f'"{self.version}"'}
        try:
            answer = s3_once(self._s3).get_object(Bucket=bucket, Key=key, **wanted)
            with closing(answer["Body"]) as body:
                data = body.read()
        except Exception as error:
            if type(error).__module__.startswith("urllib3"):  # of a broken body, what botocore does not make its own
                raise ConnectionResetError(errno.ECONNRESET, str(error)) from None
            status = (getattr(error, "response", None) or {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status == 412:
                raise self._changed("its ETag is another") from None
            raise
        if answer["ETag"].strip('"') != self.version:  # a server that does not know If-Match
            raise self._changed("its ETag is another")
        return data

    def _local_bytes(self, size: int, offset: int) -> bytes:
        try:
            data = self._opened().read_at(size, offset)
            self._check_local()
        except BaseException:
            self._reopen()
            raise
        return data

    def _opened(self) -> pa.NativeFile:
        if self.closed:
            raise ValueError(f"{self.uri}: read after it was closed")
        if self._file is None:
            self._file = pa.OSFile(local_path(self.uri))
            self._check_local()
        return self._file

    def _check_local(self) -> None:
        found = Path(local_path(self.uri)).stat()
        if found.st_size != self.size_bytes:
            raise self._changed(f"{self.size_bytes} bytes when listed, {found.st_size} now")
        if str(found.st_mtime_ns) != self.version:
            raise self._changed("its modification time is another")

    def _changed(self, what: str) -> DataError:
        return DataError(
            f"{self.uri}: changed since the run listed it: {what}.\n  Put the old file back, or start a run of another name on the new one."
        )

    def _reopen(self) -> None:
        """The next read opens the file anew."""
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            file.close()
