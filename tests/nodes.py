"""Real Ray nodes on one machine that come and go (`ray.cluster_utils.Cluster`), and a run whose driver connects to them as to any."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.kills import Watched
from tests.small_run import ROOT

STORE_BYTES = 100 << 20  # each node's object store


def start_on(address: str, recipe: Path, *settings: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    command = [sys.executable, "-m", "jobs.pretrain", "--config", str(recipe)]
    for setting in settings:
        command += ["--set", setting]
    return subprocess.Popen(command, cwd=recipe.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Nodes:
    """A cluster that has a head of one CPU at first, and the run on it."""

    def __init__(self, recipe: Path) -> None:
        self.recipe = recipe
        self.process: subprocess.Popen[str] | None = None
        self.cluster: Any = None
        self.start_head()

    def start_head(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)

    def kill_head(self) -> None:
        """SIGKILL to every process of the head."""
        daemons = [psutil.Process(daemon.process.pid) for group in self.cluster.head_node.all_processes.values() for daemon in group]
        for process in daemons + [child for daemon in daemons for child in daemon.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def add(self, cpus: int, count: int = 1) -> list[Any]:
        nodes = [self.cluster.add_node(num_cpus=cpus, object_store_memory=STORE_BYTES) for _ in range(count)]
        self.cluster.wait_for_nodes()
        return nodes

    def start(self, name: str, *settings: str) -> Watched:
        storage = self.recipe.parent / "runs"
        self.process = start_on(self.cluster.address, self.recipe, *settings, f"run.name={name}", f"run.storage={storage}")
        return Watched(self.process, storage / name)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        self.cluster.shutdown()
