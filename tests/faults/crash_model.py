"""What a crash can leave of a sequence of file operations: every state that POSIX allows at every moment.

A folder is a map of names to inodes; creating, renaming and unlinking edit it. An edit is certain to outlive a crash only once its folder
was synced after it, and a file's bytes only once the file was synced after they were written. Everything else may be kept or lost by
itself, in any combination; bytes may also be cut off in the middle, or be zeros. (An entry is not made durable by syncing the file that it
names: ext4 does that, POSIX does not promise it.)
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_STATES = 4096  # at one moment; where more are possible: the extremes, every single loss and survival, and so many at random


@dataclass(frozen=True)
class Op:
    """kind: mkdir, create, truncate, write, sync, sync_folder, rename, unlink, rmdir, or mark (nothing on the disk: a moment with a name).
    Paths are relative to the root that is watched."""

    kind: str
    path: str
    other: str = ""  # where a rename goes
    data: bytes = b""
    at: int | None = None  # offset of a write; None: at the end


@dataclass
class _File:
    data: bytes = b""
    durable: bytes = b""


@dataclass
class _Edit:
    changes: tuple[tuple[int, str, int | None], ...]  # (folder, name, inode or None)
    certain: bool = False


@dataclass
class Disk:
    """The operations so far."""

    files: dict[int, _File] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})  # as a running system sees them
    edits: list[_Edit] = field(default_factory=list)
    _next: int = 1

    def apply(self, op: Op) -> None:
        if op.kind == "mark":
            return
        if op.kind in ("mkdir", "create"):
            folder, name = self._parent(op.path)
            inode, self._next = self._next, self._next + 1
            if op.kind == "mkdir":
                self.folders[inode] = {}
            else:
                self.files[inode] = _File()
            self._edit((folder, name, inode))
        elif op.kind == "truncate":
            self.files[self._inode(op.path)].data = b""
        elif op.kind == "write":
            file = self.files[self._inode(op.path)]
            at = len(file.data) if op.at is None else op.at
            file.data = file.data[:at].ljust(at, b"\0") + op.data + file.data[at + len(op.data) :]
        elif op.kind == "sync":
            file = self.files[self._inode(op.path)]
            file.durable = file.data
        elif op.kind == "sync_folder":
            folder = self._inode(op.path)
            for edit in self.edits:
                edit.certain |= any(change[0] == folder for change in edit.changes)
        elif op.kind == "rename":
            (old_folder, old), (new_folder, new) = self._parent(op.path), self._parent(op.other)
            self._edit((old_folder, old, None), (new_folder, new, self.folders[old_folder][old]))
        elif op.kind in ("unlink", "rmdir"):
            folder, name = self._parent(op.path)
            self._edit((folder, name, None))
        else:
            raise AssertionError(op)

    def states(self, rng: random.Random, most: int = MOST_STATES) -> Iterator[dict[str, bytes | None]]:
        """{path: bytes, None for a folder}, each distinct state once."""
        reachable = self._reachable()
        open_edits = [edit for edit in self.edits if not edit.certain and any(change[0] in reachable for change in edit.changes)]
        variants = {inode: _variants(file) for inode, file in self.files.items() if inode in reachable}
        choices: list[list[Any]] = [[True, False]] * len(open_edits) + [each for each in variants.values() if len(each) > 1]
        unsettled = [inode for inode, each in variants.items() if len(each) > 1]
        seen: set[frozenset[tuple[str, bytes | None]]] = set()
        for choice in _combinations(choices, rng, most):
            kept = {id(edit) for edit, keep in zip(open_edits, choice, strict=False) if keep}
            contents = {inode: each[0] for inode, each in variants.items()}
            contents |= dict(zip(unsettled, choice[len(open_edits) :], strict=True))
            tree = self._tree(kept, contents)
            key = frozenset(tree.items())
            if key not in seen:
                seen.add(key)
                yield tree

    def now(self) -> dict[str, bytes | None]:
        """What a running system sees."""
        return self._tree({id(edit) for edit in self.edits}, {inode: file.data for inode, file in self.files.items()})

    def _reachable(self) -> set[int]:
        """Inodes that have a name in some state: the others' losses make no difference."""
        links: dict[tuple[int, str], set[int]] = {}
        for edit in self.edits:
            for folder, name, inode in edit.changes:
                if edit.certain:
                    links[folder, name] = set()
                if inode is not None:
                    links.setdefault((folder, name), set()).add(inode)
        found, before = {0}, set[int]()
        while found != before:
            before = set(found)
            found |= {inode for (folder, _), inodes in links.items() if folder in found for inode in inodes}
        return found

    def _tree(self, kept: set[int], contents: dict[int, bytes]) -> dict[str, bytes | None]:
        folders: dict[int, dict[str, int]] = {inode: {} for inode in self.folders}
        for edit in self.edits:
            if edit.certain or id(edit) in kept:
                for folder, name, inode in edit.changes:
                    if inode is None:
                        folders[folder].pop(name, None)
                    else:
                        folders[folder][name] = inode
        tree: dict[str, bytes | None] = {}

        def walk(folder: int, prefix: str, above: frozenset[int]) -> None:
            for name, inode in folders[folder].items():
                path = f"{prefix}{name}"
                if inode in self.files:
                    tree[path] = contents[inode]
                elif inode not in above:
                    tree[path] = None
                    walk(inode, f"{path}/", above | {inode})

        walk(0, "", frozenset({0}))
        return tree

    def _edit(self, *changes: tuple[int, str, int | None]) -> None:
        for folder, name, inode in changes:
            if inode is None:
                self.folders[folder].pop(name, None)
            else:
                self.folders[folder][name] = inode
        self.edits.append(_Edit(changes))

    def _inode(self, path: str) -> int:
        inode = 0
        for part in (part for part in path.split("/") if part):
            inode = self.folders[inode][part]
        return inode

    def _parent(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        return self._inode(folder), name


def _variants(file: _File) -> list[bytes]:
    """What may be read of a file: all that was written, only what was synced, the rest cut in the middle, the rest as zeros."""
    kept, data = file.durable, file.data
    if kept == data:
        return [data]
    found = [data, kept]
    if data.startswith(kept):
        rest = len(data) - len(kept)
        found += [data[: len(kept) + rest // 2], kept + bytes(rest)]
    return list(dict.fromkeys(found))


def _combinations(choices: list[list[Any]], rng: random.Random, most: int) -> Iterator[tuple[Any, ...]]:
    total = 1
    for each in choices:
        total *= len(each)
    if total <= most:
        yield from itertools.product(*choices)
        return
    first, last = [each[0] for each in choices], [each[-1] for each in choices]
    for base in (first, last):
        yield tuple(base)
        for i, each in enumerate(choices):
            for value in each:
                yield (*base[:i], value, *base[i + 1 :])
    for _ in range(most):
        yield tuple(rng.choice(each) for each in choices)


def crash_states(ops: list[Op], seed: int = 0, most: int = MOST_STATES) -> Iterator[tuple[int, dict[str, bytes | None]]]:
    """(number of operations begun, what is on the disk after a crash there) for every moment."""
    rng, disk = random.Random(seed), Disk()
    for number, op in enumerate([*ops, Op("mark", "end")]):
        if number == 0 or ops[number - 1].kind != "mark":
            for tree in disk.states(rng, most):
                yield number, tree
        disk.apply(op)


def materialize(tree: dict[str, bytes | None], root: Path) -> None:
    for path, data in tree.items():  # folders come before what is in them
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


class RecordingOs:
    """Stands for the module `os` in a module that is watched: does everything, and notes what changes files under `root`. `forget` names
    kinds of operations that are left out: what a protocol without them would be."""

    def __init__(self, root: Path, forget: tuple[str, ...] = ()) -> None:
        self.ops: list[Op] = []
        self._root, self._forget = f"{root}/", forget
        self._open: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def mark(self, name: str) -> None:
        self.ops.append(Op("mark", name))

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        at = path if dir_fd is None else f"{self._open[dir_fd]}/{path}"
        new = bool(flags & os.O_CREAT) and not Path(at).exists()
        file = os.open(path, flags, mode, dir_fd=dir_fd)
        self._open[file] = at
        if new:
            self._note("create", at)
        return file

    def write(self, file: int, data: memoryview) -> int:
        count = os.write(file, data)
        self._note("write", self._open[file], data=bytes(data[:count]))
        return count

    def fsync(self, file: int) -> None:
        os.fsync(file)
        self._note("sync_folder" if Path(self._open[file]).is_dir() else "sync", self._open[file])

    def mkdir(self, path: str) -> None:
        os.mkdir(path)  # noqa: PTH102
        self._note("mkdir", path)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)  # noqa: PTH104
        self._note("rename", old, other=new.removeprefix(self._root))

    def unlink(self, path: str) -> None:
        os.unlink(path)  # noqa: PTH108
        self._note("unlink", path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)  # noqa: PTH106
        self._note("rmdir", path)

    def _note(self, kind: str, path: str, **more: Any) -> None:
        if kind not in self._forget and f"{path}/".startswith(self._root):
            self.ops.append(Op(kind, f"{path}/".removeprefix(self._root).rstrip("/"), **more))
