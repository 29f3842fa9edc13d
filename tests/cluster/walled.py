"""A machine of its own for a cluster: a network in which a port can be closed as a firewall does, and a disk that can be full. Both are
the kernel's (namespaces, a routing rule, a tmpfs) and need no rights."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.small_disk import MOUNTED, SmallDisk


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
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("needs unshare and nsenter of util-linux, and ip of iproute2")
    path.mkdir()
    script = (
        f"ip link set lo up && ip rule add pref 1 lookup local && ip rule del pref 0 lookup local"
        f" && mount -t tmpfs -o size={disk_bytes} tmpfs '{path}' && echo {MOUNTED} && exec sleep infinity"
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "--net", "sh", "-c", script]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline().strip() != MOUNTED:
            pytest.skip(f"namespaces with a network and mounts are not allowed here: {holder.stderr.read().strip()}")
        yield Walled(holder.pid, path)
    finally:
        holder.kill()
        holder.communicate()
