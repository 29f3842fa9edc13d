"""A file of known size, read to the byte: a truncated read is never taken as the end of the file."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa

from llm.config import S3Section
from llm.errors import DataError
from llm.retry import ShortReadError, patiently
from llm.storage import is_s3, open_storage, storage_errors


class ExactFile(io.RawIOBase):
    """One file for reading and seeking. `read(n)` gives `n` bytes, or those up to `size_bytes`, never fewer.

    After an error that may pass, a stall or a short read, it goes on from that byte, on the file opened anew (see `llm/retry.py`); what it
    has is kept. Raises StorageError, with the place and the cause, when that did not help; DataError when the file has another size.
    """

    def __init__(self, uri: str, size_bytes: int, s3: S3Section) -> None:
        self.uri, self.size_bytes = uri, size_bytes
        self._s3 = s3
        self._filesystem, self._path = open_storage(uri, s3, patient=False)
        self._at = 0
        self._file: pa.NativeFile | None = None
        with storage_errors(uri, s3):
            patiently(self._opened)

    @property
    def for_arrow(self) -> Any:
        """What pyarrow reads Parquet from. For a local file pyarrow's own, which is faster: no network can cut its reads short. Where it
        fails, `check_size` says whether the file has shrunk."""
        return self if is_s3(self.uri) else self._opened()

    def check_size(self) -> None:
        """Raises DataError when the file no longer has the known size."""
        with storage_errors(self.uri, self._s3):
            self._reopen()
            patiently(self._opened)

    def read(self, size: int | None = -1) -> bytes:
        left = max(self.size_bytes - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        parts: list[bytes] = []

        def attempt() -> None:
            missing = wanted - sum(map(len, parts))
            try:
                data = self._opened().read_at(missing, self._at + wanted - missing)
            except BaseException:
                self._reopen()
                raise
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

    def _opened(self) -> pa.NativeFile:
        if self.closed:
            raise ValueError(f"{self.uri}: read after it was closed")
        if self._file is None:
            file = self._filesystem.open_input_file(self._path)
            if (size := file.size()) != self.size_bytes:
                file.close()
                raise DataError(
                    f"{self.uri}: changed during the run: {self.size_bytes} bytes when listed, {size} now.\n"
                    "  Put the old file back, or start a run of another name on the new one."
                )
            self._file = file
        return self._file

    def _reopen(self) -> None:
        """The next read opens the file anew."""
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            file.close()
