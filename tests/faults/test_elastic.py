"""Nodes go and come back: the run shrinks and grows by itself, and trains on the same batches with the same loss."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llm.metrics import read_rows, rows_of
from tests.kills import finish, ledger
from tests.nodes import Nodes
from tests.small_run import start_run

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
        "train.steps=250",
        "recovery.max_crashes=0",
        "recovery.hang_s=120",  # nothing is saved again before the end: a step that a busy machine makes long must not cost all
    )
    run.await_row("step", count=20, timeout_s=300)
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", nodes.cluster.address, "--node-id", leaver.node_id]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "300"]
    subprocess.run(drain, check=True, capture_output=True, timeout=60)
    restart = rows_of(run.await_row("event", "restart", timeout_s=300), "event", "restart")[0]
    finish(run.process, 600)
    assert restart["cause"] in ("planned stop", "preemption") and restart["steps_redone"] == 0, restart
    assert [step for step, _ in ledger(run.run)] == list(range(1, 251))
