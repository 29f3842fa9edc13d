"""The bytes of metrics.jsonl: where they are kept (a file, or an S3 object put as a whole), and a reader for both.

Apart from llm/metrics.py because it is about bytes and failures, not about metrics. Nothing here knows S3: `UploadSink`
and `MetricsTail` are given the calls that read and put the object.
"""

from __future__ import annotations

import json
import os
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from llm.errors import StorageError

Row = dict[str, Any]


class MetricsSink(Protocol):
    """The bytes of one file that grows by lines."""

    def read(self) -> bytes: ...
    def append(self, line: bytes) -> None: ...
    def replace(self, data: bytes) -> None: ...
    def close(self) -> None: ...


class FileSink:
    """A local or shared file. Each line is one write to the operating system, so a killed process loses none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._failed("opened", error) from error

    def read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError as error:
            raise self._failed("read", error) from error

    def append(self, line: bytes) -> None:
        try:
            written = self._file.write(line)
            while written < len(line):  # a full disk may take a part and refuse the rest
                written += self._file.write(line[written:])
        except OSError as error:
            raise self._failed("written", error) from error

    def replace(self, data: bytes) -> None:
        """All of the file at once: a reader sees the old bytes or the new ones, also after a loss of power."""
        beside = self._path.with_name(f"{self._path.name}.tmp-{os.getpid()}")
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            beside.replace(self._path)
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise self._failed("replaced", error) from error

    def close(self) -> None:
        self._file.close()

    def _failed(self, what: str, error: OSError) -> StorageError:
        return StorageError(f"{self._path} could not be {what}: {error.strerror or error}.")


class UploadSink:
    """An object that is put as a whole, by a thread of its own, so that a step never waits for the network.

    `get()` returns the object's bytes, b"" where there is none yet; `put(data)` replaces it. A put happens `every_s`
    after the last one, if rows came, and later when puts are slow: at most a twentieth of the time is spent on them,
    because a long run's file is put again and again. A put that fails is tried again; only `close()` raises
    StorageError, as metrics must not end a training run. A killed process loses the rows since the last put; its
    restart writes them again from the checkpoint on.
    """

    def __init__(self, get: Callable[[], bytes], put: Callable[[bytes], None], *, every_s: float = 5.0) -> None:
        self._put = put
        self._every_s = every_s
        self._lock = threading.Lock()  # guards _data and _changed
        self._data = bytearray(get())
        self._changed = False
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._upload_now_and_then, name="metrics-upload", daemon=True)
        self._thread.start()

    def read(self) -> bytes:
        with self._lock:
            return bytes(self._data)

    def append(self, line: bytes) -> None:
        with self._lock:
            self._data += line
            self._changed = True

    def replace(self, data: bytes) -> None:
        with self._lock:
            self._data = bytearray(data)
            self._changed = True

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._upload()
        if self._error is not None:
            raise StorageError(f"metrics.jsonl could not be uploaded: {self._error}") from self._error

    def _upload_now_and_then(self) -> None:
        pause_s = self._every_s
        while not self._closing.wait(pause_s):
            began_at_s = time.monotonic()
            self._upload()
            pause_s = max(self._every_s, 20 * (time.monotonic() - began_at_s))

    def _upload(self) -> None:
        with self._lock:
            if not self._changed:
                return
            data, self._changed = bytes(self._data), False
        try:
            self._put(data)
            self._error = None
        except Exception as error:  # whatever the store's client raises: kept for close()
            self._error = error
            with self._lock:
                self._changed = True


def parse_line(line: bytes) -> Row | None:
    """The row of one line, or None where it is damaged or of no known kind."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.get("kind") in ("step", "eval", "event") else None


class MetricsTail:
    """Reads metrics.jsonl while it grows: `poll()` returns the rows that came since the last call.

    `read_from(offset)` returns the file's bytes from `offset` on: b"" where the file does not exist (yet) or is
    shorter. For a local file that is `file_reader(path)`. A restarted trainer rewrites the file (`truncate_after`), and
    it may have grown past our offset again before we look. So each poll also reads the last line we had: when it is no
    longer there, the whole file is read and the rows not seen before are returned. The caller then sees the steps after
    the checkpoint a second time, as they were trained a second time.
    """

    def __init__(self, read_from: Callable[[int], bytes]) -> None:
        self._read_from = read_from
        self._offset = 0  # the first byte not consumed
        self._last_line = b""
        self._seen = array("q")  # a hash of each consumed line: 8 bytes a row
        self.num_bad_lines = 0

    def poll(self) -> list[Row]:
        """New whole rows, oldest first; a half-written last line waits. Other lines are counted in num_bad_lines."""
        data = self._read_from(self._offset - len(self._last_line))
        if data.startswith(self._last_line):
            return self._rows(_whole_lines(data[len(self._last_line) :]), already=frozenset())
        already = frozenset(self._seen)
        data = self._read_from(0)
        if not data:  # being replaced, or gone for good: what we know stays as it is
            return []
        self._offset, self._last_line = 0, b""
        del self._seen[:]
        return self._rows(_whole_lines(data), already)

    def _rows(self, lines: list[bytes], already: frozenset[int]) -> list[Row]:
        rows = []
        for line in lines:
            digest = hash(line)
            self._seen.append(digest)
            self._offset += len(line)
            self._last_line = line
            if digest in already:
                continue
            row = parse_line(line)
            if row is None:
                self.num_bad_lines += 1
            else:
                rows.append(row)
        return rows


def _whole_lines(data: bytes) -> list[bytes]:
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)


def file_reader(path: Path | str) -> Callable[[int], bytes]:
    """The `read_from` of a local file: opened at each call, so a replaced file is seen."""

    def read_from(offset: int) -> bytes:
        try:
            with Path(path).open("rb") as file:
                file.seek(offset)
                return file.read()
        except FileNotFoundError:
            return b""

    return read_from


def read_rows(path: Path | str) -> list[Row]:
    """All rows of a local metrics.jsonl; empty where there is none. A half-written or damaged line is left out."""
    return MetricsTail(file_reader(path)).poll()
