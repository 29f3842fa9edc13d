"""Nodes go and come back: the run shrinks and grows by itself, and trains on the same batches with the same loss.

Real raylets on one machine (`ray.cluster_utils.Cluster`); the driver connects to them as to any cluster.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm.metrics import read_rows, rows_of
from tests.kills import Watched, finish, ledger
from tests.small_run import ROOT, start_run

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


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_four_workers_two_and_four_again_as_nodes_go_and_come_back(recipe, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the nodes' processes import the training code
    memory, storage = 100 << 20, f"run.storage={recipe.parent / 'runs'}"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": memory, "include_dashboard": False})
    process = None
    try:
        cluster.add_node(num_cpus=2, object_store_memory=memory)
        leaver = cluster.add_node(num_cpus=2, object_store_memory=memory)
        cluster.wait_for_nodes()
        process = start_on(cluster.address, recipe, *SETTINGS, "run.name=elastic", storage, "parallel.min_workers=2")
        run = Watched(process, recipe.parent / "runs" / "elastic")
        run.await_row("step", count=30, timeout_s=300)
        cluster.remove_node(leaver, allow_graceful=False)
        rows = run.await_row("event", "restart", timeout_s=300)
        assert rows_of(rows, "event", "restart")[0]["cause"] == "node lost", rows
        run.await_row("step", count=10, timeout_s=300)
        cluster.add_node(num_cpus=2, object_store_memory=memory)
        rows = run.await_row("event", "restart", timeout_s=300)
        assert rows_of(rows, "event", "restart")[0]["cause"] == "planned stop", rows
        finish(process, 600)
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.communicate()
        cluster.shutdown()
    finish(start_run(recipe, *SETTINGS, "run.name=whole", storage), 600)
    elastic, whole = recipe.parent / "runs" / "elastic", recipe.parent / "runs" / "whole"
    starts = rows_of(read_rows(elastic / "metrics.jsonl"), "event", "start")
    assert [row["workers"] for row in starts] == [4, 2, 4]
    assert ledger(elastic) == ledger(whole)
    losses = [[row["loss"] for row in rows_of(read_rows(run / "metrics.jsonl"), "step")] for run in (elastic, whole)]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_node_that_will_be_taken_away_is_left_in_order_and_no_step_is_done_again(recipe, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    memory, storage = 100 << 20, f"run.storage={recipe.parent / 'runs'}"
    settings = (
        *SETTINGS,
        "parallel.workers=2",
        "parallel.tensor=1",
        "parallel.min_workers=1",
        "checkpoint.every_steps=1000",
        "train.steps=400",
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": memory, "include_dashboard": False})
    process = None
    try:
        leaver = cluster.add_node(num_cpus=1, object_store_memory=memory)
        cluster.add_node(num_cpus=1, object_store_memory=memory)
        cluster.wait_for_nodes()
        process = start_on(cluster.address, recipe, *settings, "recovery.max_crashes=0", "run.name=drained", storage)
        run = Watched(process, recipe.parent / "runs" / "drained")
        run.await_row("step", count=20, timeout_s=300)
        drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id", leaver.node_id]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "300"]
        subprocess.run(drain, check=True, capture_output=True, timeout=60)
        rows = run.await_row("event", "restart", timeout_s=300)
        restart = rows_of(rows, "event", "restart")[0]
        finish(process, 600)
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.communicate()
        cluster.shutdown()
    assert restart["cause"] in ("planned stop", "preemption") and restart["steps_redone"] == 0, restart
    assert [step for step, _ in ledger(run.run)] == list(range(1, 401))
