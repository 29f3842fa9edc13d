"""Checkpoints on a disk: written under a temporary name, made durable, then renamed, which is the one act that publishes.

Nothing but a checkpoint is ever named `step-` and digits, and nothing is removed under that name. The order of the calls is what
`tests/faults/test_crash_states.py` checks: whatever a crash keeps of them, a reader finds whole checkpoints only.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from llm.checkpoint.layout import step_folder, step_of
from llm.checkpoint.manifest import MANIFEST, EntryHasher, FileEntry
from llm.errors import CheckpointError, DamagedCheckpointError

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # non-blocking: a planted FIFO must not hang its reader
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY, _REMOVED, _ASIDE = ".tmp-", ".removed-", ".damaged-"


class DiskCheckpoints:
    """The folder `path` with a run's checkpoints. `folder` in the methods: the name of an attempt's temporary folder in it."""

    files_in = ""  # in the published folder itself

    def __init__(self, path: str) -> None:
        self.path = path

    def steps(self) -> list[int]:
        return sorted((step for name in self._folders() if (step := step_of(name)) is not None and self._has_manifest(name)), reverse=True)

    def begin(self, step: int, attempt: str) -> str:
        """Makes the attempt's folder, durably, and removes those of attempts that ended or were overtaken."""
        self._make_durably(self.path)
        for name in self._folders():
            if name.startswith("step-") and (_TEMPORARY in name or _REMOVED in name):
                self._empty_and_remove(name)
        folder = f"{step_folder(step)}{_TEMPORARY}{attempt}"
        os.mkdir(self._at(folder))  # noqa: PTH102
        return folder

    def write(self, folder: str, name: str, chunks: Iterable[Any]) -> FileEntry:
        """Writes a file and makes it durable. One that could not be written whole is removed, so that a full disk has room again."""
        path, hasher = self._at(folder, name), EntryHasher()
        file = os.open(path, _NEW, 0o644)
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                hasher.update(view)
                while len(view):
                    view = view[os.write(file, view) :]
            os.fsync(file)
        except BaseException:
            with suppress(OSError):
                os.unlink(path)  # noqa: PTH108
            raise
        finally:
            os.close(file)
        self._sync_folder(self._at(folder))
        return hasher.entry()

    def require_written(self, folder: str, entries: dict[str, FileEntry]) -> None:
        """Raises CheckpointError where a file is missing or has another size: some rank writes into another folder than this one reads."""
        for name, entry in entries.items():
            try:
                size = os.lstat(self._at(folder, name)).st_size
            except FileNotFoundError:
                size = None
            if size != entry.size_bytes:
                raise CheckpointError(
                    f"{self._at(folder, name)}: {entry.size_bytes} bytes were written, and {'none are' if size is None else f'{size} are'} "
                    "here. Is the run's folder one that all nodes share, and did another driver take the run over?"
                )

    def publish(self, step: int, folder: str, manifest: bytes, fence: Callable[[], None]) -> None:
        self.write(folder, MANIFEST, [manifest])
        fence()
        target = self._at(step_folder(step))
        try:
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "it is there")
            os.rename(self._at(folder), target)  # noqa: PTH104
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise CheckpointError(f"{target} was published by another driver in the meantime. This one gives up.") from None
            raise
        self._sync_folder(self.path)

    def abandon(self, folder: str) -> None:
        self._empty_and_remove(folder)

    def remove(self, step: int, attempt: str) -> None:
        """Takes a checkpoint away: first its name, durably, then its files."""
        name = f"{step_folder(step)}{_REMOVED}{attempt}"
        os.rename(self._at(step_folder(step)), self._at(name))  # noqa: PTH104
        self._sync_folder(self.path)
        self._empty_and_remove(name)

    def set_aside(self, step: int, attempt: str) -> str:
        """Gives a checkpoint a name that no reader looks at; returns where it is now."""
        target = self._at(f"{step_folder(step)}{_ASIDE}{attempt}")
        os.rename(self._at(step_folder(step)), target)  # noqa: PTH104
        self._sync_folder(self.path)
        return target

    def signature(self, step: int, folder: str, names: Iterable[str]) -> object:
        """Changes when a file does; equal: no need to hash them again."""
        inside = self._at(step_folder(step), folder) if folder else self._at(step_folder(step))
        found: list[object] = []
        for name in sorted(names):
            with suppress(FileNotFoundError):
                info = os.lstat(f"{inside}/{name}")
                found.append((name, info.st_ino, info.st_size, info.st_mtime_ns))
        return found

    def read_manifest(self, step: int, limit: int) -> bytes:
        """The manifest's bytes, and no more than one above `limit`."""
        with self._opened(step, "", MANIFEST) as (file, size):
            return _read_into(file, bytearray(min(size, limit + 1)), 0)

    def sizes(self, step: int, folder: str) -> dict[str, int]:
        """{name: size} of the regular files of a checkpoint."""
        inside = self._at(step_folder(step), folder) if folder else self._at(step_folder(step))
        try:
            with os.scandir(inside) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file(follow_symlinks=False)}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def read_into(self, step: int, folder: str, name: str, start: int, view: memoryview) -> None:
        """Fills `view` with the file's bytes from `start` on. Raises DamagedCheckpointError where the file ends before that."""
        with self._opened(step, folder, name) as (file, _):
            at = 0
            while at < len(view):
                count = os.preadv(file, [view[at:]], start + at)
                if count == 0:
                    raise DamagedCheckpointError(f"{self._at(step_folder(step), name)} is damaged: it ends at byte {start + at}.")
                at += count

    @contextmanager
    def _opened(self, step: int, folder: str, name: str) -> Iterator[tuple[int, int]]:
        """(descriptor, size) of a regular file of the checkpoint. No symbolic link is followed below the folder of checkpoints."""
        where = "/".join(part for part in (self._at(step_folder(step)), folder, name) if part)
        opened: list[int] = []
        try:
            try:
                opened.append(os.open(self._at(step_folder(step)), _READ | os.O_DIRECTORY))
                if folder:
                    opened.append(os.open(folder, _READ | os.O_DIRECTORY, dir_fd=opened[-1]))
                opened.append(os.open(name, _READ, dir_fd=opened[-1]))
                info = os.fstat(opened[-1])
                if not stat.S_ISREG(info.st_mode):
                    raise DamagedCheckpointError(f"{where} is no regular file. Nothing else is read from a checkpoint.")
                yield opened[-1], info.st_size
            except OSError as error:
                if why := _DAMAGE.get(error.errno or 0):
                    raise DamagedCheckpointError(f"{where} {why}.") from None
                raise
        finally:
            for each in opened:
                os.close(each)

    def _at(self, *parts: str) -> str:
        return "/".join((self.path, *parts))

    def _folders(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def _has_manifest(self, name: str) -> bool:
        try:
            return stat.S_ISREG(os.lstat(self._at(name, MANIFEST)).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _make_durably(self, path: str) -> None:
        if not os.path.isdir(path):  # noqa: PTH112
            above = os.path.dirname(path)  # noqa: PTH120
            self._make_durably(above)
            with suppress(FileExistsError):
                os.mkdir(path)  # noqa: PTH102
            self._sync_folder(above)

    def _sync_folder(self, path: str) -> None:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems sync folders by themselves and refuse to be asked
                raise
        finally:
            os.close(folder)

    def _empty_and_remove(self, name: str) -> None:
        """Removes a folder as far as it goes: where its writer still lives, the next `begin` removes the rest."""
        with suppress(OSError):
            for entry in list(os.scandir(self._at(name))):
                if entry.is_dir(follow_symlinks=False):
                    self._empty_and_remove(f"{name}/{entry.name}")
                else:
                    os.unlink(entry.path)  # noqa: PTH108
            os.rmdir(self._at(name))  # noqa: PTH106


_DAMAGE = {
    errno.ENOENT: "is missing",
    errno.ELOOP: "is a symbolic link, which is never followed in a checkpoint",
    errno.ENOTDIR: "is not where a checkpoint has it: a part of its path is a file or a symbolic link",
    errno.EISDIR: "is a folder",
    errno.ENXIO: "is no regular file",
    errno.EIO: "cannot be read: the disk reports an error",
}


def _read_into(file: int, buffer: bytearray, start: int) -> bytes:
    view, at = memoryview(buffer), 0
    while at < len(view):
        count = os.preadv(file, [view[at:]], start + at)
        if count == 0:
            break
        at += count
    return bytes(view[:at])
