"""A real Ray cluster on this machine, each node a `ray start` with an environment of its own; and the doctor as a user calls it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
START_S = 120
MARK = "HEADRACE_TEST_CLUSTER"  # inherited by every process of a node, whoever its parent is later
NODE_FLAGS = ("--node-ip-address=127.0.0.1", "--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0")


class PlantedCluster:
    """A head of 3 CPUs that asks for a token. `before`: a command that starts each process, as `nsenter` does."""

    def __init__(self, folder: Path, before: tuple[str, ...], env: dict[str, str]) -> None:
        self.folder, self.before = folder, before
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.env = {**os.environ, **token, "PYTHONPATH": str(ROOT), MARK: str(folder), **env}
        self.env.pop("RAY_ADDRESS", None)
        self.address = f"127.0.0.1:{free_port()}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        port = self.address.rpartition(":")[2]
        self._start(["--head", f"--port={port}", "--num-cpus=3", "--include-dashboard=false", f"--temp-dir={folder}"], {})

    def add(self, *flags: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """One more node of one CPU, whose processes see `env` too."""
        return self._start([f"--address={self.address}", "--num-cpus=1", *flags], env or {})

    def doctor(self, *options: str, env: dict[str, str] | None = None) -> tuple[int, list[dict[str, Any]]]:
        """Its exit code and findings."""
        done = self.told("--json", "--timeout", "60", "--min-gb-per-s", "0", *options, env=env)
        assert done.stdout, done.stderr[-3000:]
        return done.returncode, json.loads(done.stdout)

    def told(self, *options: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [*self.before, sys.executable, "-m", "jobs.doctor", "--address", self.address, *options]
        environment = {**self.env, **(env or {})}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)

    def raylet_of(self, node: subprocess.Popen[bytes]) -> psutil.Process:
        return next(child for child in psutil.Process(node.pid).children(recursive=True) if child.name() == "raylet")

    def _start(self, flags: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        command = [*self.before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *NODE_FLAGS, *flags]
        log = self.folder / f"node-{len(self.nodes)}.log"
        with log.open("wb") as out:
            node = subprocess.Popen(command, cwd="/", env={**self.env, **env}, stdout=out, stderr=out, start_new_session=True)
        self.nodes.append(node)
        deadline_s = time.monotonic() + START_S
        while "Ray runtime started" not in (told := log.read_text(errors="replace")):
            assert node.poll() is None and time.monotonic() < deadline_s, told[-3000:]
            time.sleep(0.2)
        return node

    def close(self) -> None:
        """Ends every process of the cluster: again until none is left, for a raylet starts workers up to its end."""
        while ours := [process for process in psutil.process_iter() if self._is_ours(process)]:
            for process in ours:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            for node in self.nodes:
                node.wait()
            psutil.wait_procs(ours, timeout=10)

    def _is_ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.environ().get(MARK) == self.env[MARK] and process.status() != psutil.STATUS_ZOMBIE
        return False


@contextmanager
def planted_cluster(before: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Iterator[PlantedCluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: a socket's path is at most 107 characters long
    cluster = None
    try:
        cluster = PlantedCluster(folder, before, env or {})
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        shutil.rmtree(folder, ignore_errors=True)
