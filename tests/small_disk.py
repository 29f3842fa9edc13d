"""A real file system of a few MiB that can be filled: a tmpfs in a mount namespace of its own, which needs no rights."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

MOUNTED = "mounted"


@dataclass(frozen=True)
class SmallDisk:
    """`path`: where processes started with `entering` before their command see it; `seen`: where every other process does."""

    holder: int  # a process that keeps the namespace
    path: Path

    @property
    def entering(self) -> tuple[str, ...]:
        wd = str(self.path.parent)
        return ("nsenter", "--user", "--mount", "--preserve-credentials", "--target", str(self.holder), f"--wd={wd}")

    @property
    def seen(self) -> Path:
        return Path(f"/proc/{self.holder}/root{self.path}")

    def fill(self, but_for_bytes: int = 0) -> None:
        """Leaves so much room, to a page, whatever else is written meanwhile."""
        with (self.seen / "filler").open("ab", buffering=0) as file, suppress(OSError):
            while (room_bytes := self._free_bytes() - but_for_bytes) > 0:
                file.write(bytes(min(room_bytes, 1 << 20)))

    def make_room(self) -> None:
        (self.seen / "filler").unlink()

    def _free_bytes(self) -> int:
        found = os.statvfs(self.seen)
        return found.f_bavail * found.f_frsize


@contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """Mounted at `path`, an empty folder. Skips the test where this user may not have namespaces of its own."""
    with held_namespaces(path, size_bytes) as holder:
        yield SmallDisk(holder, path)


@contextmanager
def held_namespaces(path: Path, size_bytes: int, *options: str, setup: str = "true", tools: tuple[str, ...] = ()) -> Iterator[int]:
    """The process that keeps user and mount namespaces, with a tmpfs at `path`, and more of them by `options` of unshare. `setup`: a shell
    command that runs inside first, and needs `tools`. Skips the test where one is not here or namespaces are not allowed."""
    if missing := [tool for tool in ("unshare", "nsenter", *tools) if not shutil.which(tool)]:
        pytest.skip(f"namespaces need {missing[0]} (unshare and nsenter are util-linux's, ip is iproute2's), and it is not here")
    path.mkdir()
    script = f"{setup} && mount -t tmpfs -o size={size_bytes} tmpfs '{path}' && echo {MOUNTED} && exec sleep infinity"
    command = ["unshare", "--user", "--map-root-user", "--mount", *options, "sh", "-c", script]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline().strip() != MOUNTED:
            pytest.skip(f"namespaces with mounts are not allowed here: {holder.stderr.read().strip()}")
        yield holder.pid
    finally:
        holder.kill()
        holder.communicate()
