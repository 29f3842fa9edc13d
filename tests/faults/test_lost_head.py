"""The cluster's head dies: the command ends in bounded time and says so, and goes on on another cluster to the same end."""

from __future__ import annotations

import time

import pytest

from llm.metrics import read_rows, rows_of
from tests.kills import checkpoints, finish, ledger
from tests.nodes import Nodes
from tests.small_run import start_run

SETTINGS = (
    "train.steps=300",
    "checkpoint.every_steps=10",
    "checkpoint.keep=1000",
    "eval.rows=0",
    "export.enabled=false",
    "parallel.workers=2",
)
NOTICED_S = 75  # 45 s of patience with the head, 5 s between two looks; the rest is a busy machine's. Ray itself would give up after 60.


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_run_whose_head_is_gone_ends_with_that_word_and_goes_on_on_another_cluster(nodes: Nodes):
    nodes.add(cpus=2)
    run = nodes.start("moved", *SETTINGS)
    run.await_row("step", count=25, timeout_s=300)
    nodes.kill_head()
    killed_s = time.monotonic()
    _, err = run.process.communicate(timeout=180)
    assert time.monotonic() - killed_s < NOTICED_S
    assert run.process.returncode == 3
    assert "the head of the Ray cluster" in err and "run the same command" in err.lower() and "Traceback" not in err, err
    nodes.cluster.shutdown()

    nodes.start_head()
    nodes.add(cpus=2)
    run = nodes.start("moved", *SETTINGS)
    finish(run.process)
    nodes.cluster.shutdown()
    finish(start_run(nodes.recipe, *SETTINGS, "run.name=whole", f"run.storage={run.run.parent}"))
    restart = rows_of(read_rows(run.run / "metrics.jsonl"), "event", "restart")[-1]
    assert restart["cause"] == "new command" and restart["step"] >= 20, restart
    assert ledger(run.run) == ledger(run.run.with_name("whole"))
    assert checkpoints(run.run) == checkpoints(run.run.with_name("whole"))
