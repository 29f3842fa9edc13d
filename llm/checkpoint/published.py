"""A published checkpoint for reading: no byte leaves here that was not verified, and no file is opened outside its folder.

Trusts nothing: names, sizes and links are checked before a file is opened or memory is taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Protocol

from llm.checkpoint.manifest import BLOCK_BYTES, MANIFEST, FileEntry, Manifest
from llm.checkpoint.strict_json import MAX_JSON_BYTES
from llm.config import S3Section
from llm.errors import DamagedCheckpointError
from llm.storage import join, storage_errors


class _Files(Protocol):
    def read_manifest(self, step: int, limit: int) -> bytes: ...

    def sizes(self, step: int, folder: str) -> dict[str, int]: ...

    def read_into(self, step: int, folder: str, name: str, start: int, view: memoryview) -> None: ...


class Published:
    """The checkpoint of `step`. Its methods raise DamagedCheckpointError where bytes are not those of the manifest, are missing, or lie
    where none of a checkpoint's do; StorageError where the disk or S3 fails. Threads may share it."""

    def __init__(self, files: _Files, uri: str, s3: S3Section, step: int) -> None:
        self._files, self._s3 = files, s3
        self.uri, self.step = uri, step
        data = files.read_manifest(step, MAX_JSON_BYTES)
        self.manifest = Manifest.from_bytes(data, step, join(uri, MANIFEST))
        self._last: tuple[str, int, bytes] = ("", 0, b"")  # name, number and bytes of the block that was verified last
        self._sizes: dict[str, int] | None = None  # of the files that are there

    @property
    def files(self) -> Mapping[str, FileEntry]:
        return self.manifest.files

    def entry(self, name: str) -> FileEntry:
        if name not in self.files:
            raise DamagedCheckpointError(f"{self.uri} has no file {name[:100]!r}: its manifest names none.")
        return self.files[name]

    def read(self, name: str, limit_bytes: int = MAX_JSON_BYTES) -> bytes:
        """A whole file of at most `limit_bytes`: for states and indexes. Tensors: `read_range`."""
        size = self.entry(name).size_bytes
        if size > limit_bytes:
            raise DamagedCheckpointError(f"{join(self.uri, name)} has {size} bytes, more than the {limit_bytes} that such a file may have.")
        return bytes(self.read_range(name, 0, size))

    def read_range(self, name: str, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of a file, all of whose blocks that they lie in are read and verified. Memory: the result and two blocks."""
        size = self.entry(name).size_bytes
        if not 0 <= start <= stop <= size:
            raise DamagedCheckpointError(f"{join(self.uri, name)}: bytes {start} to {stop} were asked for, and it has {size}.")
        self._require_size(name)
        result = bytearray(stop - start)
        view = memoryview(result)
        at = start
        while at < stop:
            number = at // BLOCK_BYTES
            first = number * BLOCK_BYTES
            last = min(first + BLOCK_BYTES, size)
            until = min(last, stop)
            target = view[at - start : until - start]
            if at == first and until == last:
                self._read_block(name, number, target)
            else:
                target[:] = memoryview(self._block(name, number))[at - first : until - first]
            at = until
        return result

    def blocks(self, name: str) -> Iterator[bytes]:
        """All of a file, block by block, each verified: for hashing and copying in little memory."""
        self._require_size(name)
        for number in range(len(self.entry(name).block_sha256)):
            yield self._block(name, number)

    def damage(self) -> dict[str, str]:
        """Reads everything: {file: what is wrong with it}, empty where all is as it was saved."""
        found: dict[str, str] = {}
        for name in self.files:
            try:
                for _ in self.blocks(name):
                    pass
            except DamagedCheckpointError as error:
                found[name] = str(error)
        return found

    def require_whole(self) -> None:
        """Reads everything; raises DamagedCheckpointError at the first byte that is not as it was saved."""
        for name in self.files:
            for _ in self.blocks(name):
                pass

    def require_files(self) -> None:
        """Raises DamagedCheckpointError where a file is missing or has another size. Reads none: lists the folder."""
        for name in self.files:
            self._require_size(name)

    def _require_size(self, name: str) -> None:
        wanted = self.entry(name).size_bytes
        if self._sizes is None:
            with storage_errors(self.uri, self._s3):
                self._sizes = self._files.sizes(self.step, self.manifest.folder)
        size = self._sizes.get(name)
        if size is None:
            raise DamagedCheckpointError(f"{join(self.uri, name)} is missing, or no regular file.")
        if size != wanted:
            raise DamagedCheckpointError(f"{join(self.uri, name)} is damaged: it has {size} bytes, and {wanted} were saved.")

    def _block(self, name: str, number: int) -> bytes:
        last = self._last
        if last[:2] == (name, number) and last[0]:
            return last[2]
        size = self.entry(name).size_bytes
        buffer = bytearray(min(BLOCK_BYTES, size - number * BLOCK_BYTES))
        self._read_block(name, number, memoryview(buffer))
        data = bytes(buffer)
        self._last = (name, number, data)
        return data

    def _read_block(self, name: str, number: int, view: memoryview) -> None:
        start = number * BLOCK_BYTES
        with storage_errors(join(self.uri, name), self._s3):
            self._files.read_into(self.step, self.manifest.folder, name, start, view)
        if hashlib.sha256(view).hexdigest() != self.entry(name).block_sha256[number]:
            raise DamagedCheckpointError(
                f"{join(self.uri, name)} is damaged: bytes {start} to {start + len(view)} are not those that were saved (SHA-256)."
            )
