"""Nodes go and come back: the run shrinks and grows by itself, and trains on the same batches with the same loss.

Real raylets on one machine (`ray.cluster_utils.Cluster`); the driver connects to them as to any cluster.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm.metrics import read_rows, rows_of
from tests.kills import Watched, finish, ledger
from tests.small_run import ROOT, start_run

STORE_BYTES = 100 << 20  # each node's object store
SETTINGS = (
    "parallel.workers=4",
    "parallel.tensor=2",
    "train.steps=300",
    "train.batch_rows=16",
    "train.lr=1.0e-3",
    "data.seq_len=64",
    "checkpoint.every_steps=20",
    "eval.rows=0",
    "export.enabled=false",
)


def start_on(address: str, recipe: Path, *settings: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    command = [sys.executable, "-m", "jobs.pretrain", "--config", str(recipe)]
    for setting in settings:
        command += ["--set", setting]
    return subprocess.Popen(command, cwd=recipe.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@dataclass
class Nodes:
    """Ray nodes that come and go on this machine, and a run on them."""

    cluster: Any
    recipe: Path
    process: subprocess.Popen[str] | None = None

    def add(self, cpus: int, count: int = 1) -> list[Any]:
        nodes = [self.cluster.add_node(num_cpus=cpus, object_store_memory=STORE_BYTES) for _ in range(count)]
        self.cluster.wait_for_nodes()
        return nodes

    def start(self, name: str, *settings: str) -> Watched:
        storage = self.recipe.parent / "runs"
        self.process = start_on(self.cluster.address, self.recipe, *settings, f"run.name={name}", f"run.storage={storage}")
        return Watched(self.process, storage / name)


@pytest.fixture
def nodes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the nodes' processes import the training code
    head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    nodes = Nodes(Cluster(initialize_head=True, head_node_args=head), recipe)
    try:
        yield nodes
    finally:
        if nodes.process is not None and nodes.process.poll() is None:
            nodes.process.kill()
            nodes.process.communicate()
        nodes.cluster.shutdown()


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_four_workers_two_and_four_again_as_nodes_go_and_come_back(nodes: Nodes):
    _, leaver = nodes.add(cpus=2, count=2)
    run = nodes.start("elastic", *SETTINGS, "parallel.min_workers=2")
    run.await_row("step", count=30, timeout_s=300)
    nodes.cluster.remove_node(leaver, allow_graceful=False)
    rows = run.await_row("event", "restart", timeout_s=300)
    assert rows_of(rows, "event", "restart")[0]["cause"] == "node lost", rows
    run.await_row("step", count=10, timeout_s=300)
    nodes.add(cpus=2, count=2)
    rows = run.await_row("event", "restart", timeout_s=300)
    assert rows_of(rows, "event", "restart")[0]["cause"] == "planned stop", rows
    finish(run.process, 600)
    nodes.cluster.shutdown()  # so that the undisturbed run has the machine
    elastic, whole = run.run, run.run.with_name("whole")
    finish(start_run(nodes.recipe, *SETTINGS, "run.name=whole", f"run.storage={whole.parent}"), 600)
    starts = rows_of(read_rows(elastic / "metrics.jsonl"), "event", "start")
    assert [row["workers"] for row in starts] == [4, 2, 4]
    assert ledger(elastic) == ledger(whole)
    losses = [[row["loss"] for row in rows_of(read_rows(run / "metrics.jsonl"), "step")] for run in (elastic, whole)]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_node_that_will_be_taken_away_is_left_in_order_and_no_step_is_done_again(nodes: Nodes):
    leaver, _ = nodes.add(cpus=1, count=2)
    run = nodes.start(
        "drained",
        *SETTINGS,
        "parallel.workers=2",
        "parallel.tensor=1",
        "parallel.min_workers=1",
        "checkpoint.every_steps=1000",
        "train.steps=400",
        "recovery.max_crashes=0",
    )
    run.await_row("step", count=20, timeout_s=300)
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", nodes.cluster.address, "--node-id", leaver.node_id]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "300"]
    subprocess.run(drain, check=True, capture_output=True, timeout=60)
    restart = rows_of(run.await_row("event", "restart", timeout_s=300), "event", "restart")[0]
    finish(run.process, 600)
    assert restart["cause"] in ("planned stop", "preemption") and restart["steps_redone"] == 0, restart
    assert [step for step, _ in ledger(run.run)] == list(range(1, 401))
