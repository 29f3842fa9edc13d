"""A head of Ray with token auth and its job server, as `ray start --head` makes one, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port

RAY = ("-m", "ray.scripts.scripts")


@dataclass(frozen=True)
class Head:
    """`environment`: a client's, with the token; `folder`: of Ray's sessions."""

    address: str
    environment: Mapping[str, str]
    folder: Path
    pid: int

    @property
    def token(self) -> str:
        return self.environment["RAY_AUTH_TOKEN"]

    @property
    def stranger(self) -> dict[str, str]:
        """The environment of a client whose token is another."""
        return {**self.environment, "RAY_AUTH_TOKEN": "0" * 64}


@contextlib.contextmanager
def token_head(
    folder: Path,
    python: Path = Path(sys.executable),
    settings: Mapping[str, str] | None = None,
    cpus: int = 4,
    options: tuple[str, ...] = (),
) -> Iterator[Head]:
    """`folder` must be short: sockets lie in it. `settings`: variables of the head alone. `options`: of `ray start`."""
    port, dashboard = free_port(), free_port()
    client = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name in ("PYTHONPATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        client.pop(name, None)
    path = f"{python.parent}:{client['PATH']}"
    words = [*RAY, "start", "--head", "--block", f"--port={port}", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1"]
    # Beside another Ray of this machine: of these ports Ray has defaults that only one can have.
    words += [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port")]
    metrics = {name: str(free_port()) for name in ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")}
    words += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--object-store-memory=200000000", f"--temp-dir={folder}"]
    head = subprocess.Popen(
        [str(python), *words, *options],
        cwd="/",
        env={**client, **metrics, "PATH": path, **(settings or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        made = Head(f"http://127.0.0.1:{dashboard}", client, folder, head.pid)
        _wait_for(made)
        yield made
    finally:
        _end(head)


def _wait_for(head: Head) -> None:
    request = urllib.request.Request(head.address + "/api/version", headers={"authorization": f"Bearer {head.token}"})
    deadline = time.monotonic() + 120
    while True:
        try:
            return urllib.request.urlopen(request, timeout=5).close()
        except OSError:
            assert time.monotonic() < deadline, "the cluster did not come up"
            time.sleep(1)


def _end(head: subprocess.Popen[bytes]) -> None:
    os.killpg(head.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
