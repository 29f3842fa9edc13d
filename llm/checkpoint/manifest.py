"""MANIFEST.json: every file of a checkpoint with its size and the SHA-256 of each of its blocks, and the manifest's own. Pure.

Blocks, so that a rank can read a part of a file and verify all that it uses. One hash a byte: a second over the whole file would double
what hashing costs (0.7 GB/s a core without hardware for it).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm.checkpoint.strict_json import strict_json
from llm.errors import DamagedCheckpointError

MANIFEST = "MANIFEST.json"
FORMAT = 2
BLOCK_BYTES = 16 << 20
MAX_FILE_BYTES = 1 << 50

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_FOLDER = re.compile(r"[0-9a-f]{16}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written. `block_sha256[i]` is of bytes [i * BLOCK_BYTES, (i + 1) * BLOCK_BYTES); the last block may be shorter."""

    size_bytes: int
    block_sha256: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"size_bytes": self.size_bytes, "block_sha256": list(self.block_sha256)}

    @staticmethod
    def from_json(raw: Any) -> FileEntry:
        """Raises ValueError where `raw` is not what `to_json` gives."""
        if not isinstance(raw, dict) or set(raw) != {"size_bytes", "block_sha256"}:
            raise ValueError("it must have exactly size_bytes and block_sha256")
        size, hashes = raw["size_bytes"], raw["block_sha256"]
        if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
            raise ValueError(f"size_bytes={str(size)[:30]} is no size of a file")
        if not isinstance(hashes, list) or len(hashes) != num_blocks(size):
            raise ValueError(f"a file of {size} bytes has {num_blocks(size)} blocks, and not so many hashes")
        if not all(isinstance(each, str) and _HASH.fullmatch(each) for each in hashes):
            raise ValueError("a hash is not 64 hexadecimal digits")
        return FileEntry(size, tuple(hashes))


class EntryHasher:
    """Makes a FileEntry of bytes that come in pieces of any length."""

    def __init__(self) -> None:
        self._size = 0
        self._done: list[str] = []
        self._block = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        at = 0
        while at < len(data):
            room = BLOCK_BYTES - self._size % BLOCK_BYTES
            piece = data[at : at + room]
            self._block.update(piece)
            at += len(piece)
            self._size += len(piece)
            if self._size % BLOCK_BYTES == 0:
                self._done.append(self._block.hexdigest())
                self._block = hashlib.sha256()

    def entry(self) -> FileEntry:
        rest = [self._block.hexdigest()] if self._size % BLOCK_BYTES else []
        return FileEntry(self._size, tuple(self._done + rest))


@dataclass(frozen=True)
class Manifest:
    step: int
    folder: str  # the files' place inside the checkpoint's folder: "" on a disk, the attempt's own on S3, where nothing can be renamed
    files: Mapping[str, FileEntry]

    def to_bytes(self) -> bytes:
        body = {
            "format": FORMAT,
            "step": self.step,
            "folder": self.folder,
            "files": {name: entry.to_json() for name, entry in self.files.items()},
        }
        return _canonical({**body, "sha256": _own_hash(body)})

    @staticmethod
    def from_bytes(data: bytes, step: int, what: str) -> Manifest:
        """The manifest of the checkpoint of `step`. `what` names it in errors.

        Raises DamagedCheckpointError where it was not written so, byte for byte, is of another step or format, or names what is no file
        of a checkpoint.
        """
        raw = strict_json(data, what)
        if not isinstance(raw, dict):
            raise DamagedCheckpointError(f"{what} is damaged: it is no JSON object.")
        if raw.get("format") == 1 and "sha256" not in raw:
            raise DamagedCheckpointError(f"{what} is of format 1, of a Headrace before this one, which reads format {FORMAT} only.")
        body = {key: value for key, value in raw.items() if key != "sha256"}
        try:
            whole = raw.get("sha256") == _own_hash(body) and _canonical(raw) == data
        except RecursionError:  # what can just be read may be too deep to write
            whole = False
        if not whole:
            raise DamagedCheckpointError(f"{what} is damaged: its bytes are not those that its own SHA-256 is of.")
        if raw.get("format") != FORMAT:
            raise DamagedCheckpointError(f"{what} is of format {str(raw.get('format'))[:20]}; this Headrace reads format {FORMAT} only.")
        if type(raw.get("step")) is not int or raw["step"] != step:
            raise DamagedCheckpointError(f"{what} is of step {str(raw.get('step'))[:20]}, and lies in the folder of step {step}.")
        folder, files = raw.get("folder"), raw.get("files")
        if not isinstance(folder, str) or (folder and not _FOLDER.fullmatch(folder)):
            raise DamagedCheckpointError(f"{what} names the folder {str(folder)[:50]!r}, which is no checkpoint's.")
        if not isinstance(files, dict):
            raise DamagedCheckpointError(f"{what} lists no files.")
        return Manifest(step, folder, {name: _entry(name, each, what) for name, each in files.items()})


def require_file_name(name: str) -> None:
    """Raises DamagedCheckpointError where `name` may not be a file of a checkpoint: letters, digits and ._- only, never a path."""
    if not _NAME.fullmatch(name) or name == MANIFEST:
        raise DamagedCheckpointError(f"{name[:100]!r} is no name of a checkpoint's file: it must be letters, digits and ._- only.")


def num_blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES)


def _entry(name: str, raw: Any, what: str) -> FileEntry:
    require_file_name(name)
    try:
        return FileEntry.from_json(raw)
    except ValueError as error:
        raise DamagedCheckpointError(f"{what}: its entry of {name} is wrong: {error}.") from None


def _canonical(raw: dict[str, Any]) -> bytes:
    return json.dumps(raw, sort_keys=True).encode()


def _own_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()
