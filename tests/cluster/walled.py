"""A machine of its own for a cluster: a network in which a port can be closed as a firewall does, and a disk that can be full. Both are
the kernel's (namespaces, a routing rule, a tmpfs) and need no rights."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.small_disk import SmallDisk, held_namespaces


class Walled(SmallDisk):
    """`entering`: a command that starts a process inside. Its network is a loopback that nobody outside reaches."""

    @property
    def entering(self) -> tuple[str, ...]:
        return ("nsenter", "--user", "--mount", "--net", "--preserve-credentials", "--target", str(self.holder))

    def close_port(self, port: int) -> None:
        """Nothing connects to that TCP port from now on, though the process behind it lives and listens."""
        rule = ["ip", "rule", "add", "pref", "0", "ipproto", "tcp", "dport", str(port), "prohibit"]
        subprocess.run([*self.entering, *rule], check=True)


@contextmanager
def walled(path: Path, disk_bytes: int) -> Iterator[Walled]:
    """The disk is at `path`, an empty folder. Skips the test where this user may not have namespaces."""
    setup = "ip link set lo up && ip rule add pref 1 lookup local && ip rule del pref 0 lookup local"
    with held_namespaces(path, disk_bytes, "--net", setup=setup, tools=("ip",)) as holder:
        yield Walled(holder, path)
