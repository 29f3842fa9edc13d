"""Runs on a cluster whose nodes Ray's autoscaler starts and ends: from none to as many as the plan needs, and back."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm.metrics import Row, read_rows, rows_of
from tests.autoscaled import Autoscaled
from tests.kills import Watched, ledger
from tests.search.sweeps import start_sweep, write_sweep
from tests.small_run import write_small_run

GANGS = ("parallel.workers=4", "parallel.tensor=2")  # on nodes of 3 CPUs, where Ray's own packing puts 3 workers on one


@pytest.fixture
def cpus(tmp_path: Path) -> Iterator[Autoscaled]:
    cluster = Autoscaled(tmp_path, {"cpu": ({"CPU": 3}, 3)})
    yield cluster
    cluster.close()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_small_run(tmp_path)


def end(process: subprocess.Popen[str], timeout_s: float = 300) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=timeout_s)
    return process.returncode, out, error


def refusal(process: subprocess.Popen[str], within_s: float) -> tuple[int, str]:
    """The exit code and what it told, so soon after it was connected to the cluster."""
    assert process.stdout is not None
    assert any(line.startswith("connecting to Ray") for line in process.stdout)
    began_s = time.monotonic()
    code, _, error = end(process)
    assert time.monotonic() - began_s < within_s, error
    return code, error


def starts(recipe: Path, name: str = "small") -> list[Row]:
    return rows_of(read_rows(recipe.parent / "runs" / name / "metrics.jsonl"), "event", "start")


def assert_no_group_is_split(nodes: list[int], tensor: int) -> None:
    groups = [set(nodes[first : first + tensor]) for first in range(0, len(nodes), tensor)]
    assert groups and all(len(group) == 1 for group in groups), nodes


@pytest.mark.timeout(600)
def test_from_no_node_to_two_and_back_with_whole_tensor_groups_and_impossible_demands_are_named(cpus: Autoscaled, recipe: Path):
    assert not cpus.nodes()
    wide = ("parallel.workers=4", "parallel.tensor=4", "model.config.num_key_value_heads=4")
    code, error = refusal(cpus.start(recipe, *wide), within_s=30)
    assert code == 3
    assert error.startswith("error: ") and "no node type has 4 CPUs" in error and "Lower parallel.workers=4 or parallel.tensor=4" in error
    assert not cpus.nodes(with_ended=True), "nothing was started for what is impossible"

    code, out, error = end(cpus.start(recipe, *GANGS))
    assert code == 0 and not error, out + error
    assert "of 2 cpu nodes" in out and "infeasible" not in out, out
    (start,) = starts(recipe)
    assert start["workers"] == 4 and sorted(start["nodes"]) == [0, 0, 1, 1]
    assert_no_group_is_split(start["nodes"], 2)
    cpus.await_nodes({}, timeout_s=120)
    assert len(cpus.nodes(with_ended=True)) == 2, "no more nodes were started than the plan needs"


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_more_gpus_than_the_autoscaler_may_start_are_named_and_a_wait_has_an_end(tmp_path: Path, recipe: Path):
    cluster = Autoscaled(tmp_path, {"cpu": ({"CPU": 4}, 1), "gpu": ({"CPU": 1, "GPU": 1}, 2)})
    try:
        code, error = refusal(cluster.start(recipe, "parallel.workers=5", "train.batch_rows=10"), within_s=30)
        assert code == 3 and "5 GPU workers" in error and "max_workers" in error, error
        code, out, error = end(cluster.start(recipe, "parallel.wait_nodes_s=0", "parallel.device=cpu", "run.name=hasty"))
        assert code == 3 and "after 0 s (parallel.wait_nodes_s)" in error, out + error
        code, out, error = end(cluster.start(recipe, "parallel.wait_nodes_s=0", "run.name=hasty-too"))
        assert code == 3 and "after 0 s (parallel.wait_nodes_s)" in error and "parallel.device=cpu" in error, out + error
        stopped = cluster.start(recipe, "parallel.device=cpu", "run.name=stopped")
        assert stopped.stdout is not None
        assert any(line.startswith("waiting for ") for line in stopped.stdout)
        stopped.send_signal(signal.SIGINT)
        code, _, error = end(stopped, 60)
        assert code == 130 and error.startswith("interrupted: "), error
        cluster.await_nodes({}, timeout_s=120)
    finally:
        cluster.close()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_node_that_is_lost_is_replaced_and_no_group_is_split(cpus: Autoscaled, recipe: Path):
    storage = recipe.parent / "runs"
    process = cpus.start(recipe, *GANGS, "train.steps=200", "checkpoint.every_steps=20", "eval.rows=0", f"run.storage={storage}")
    run = Watched(process, storage / "small")
    run.await_row("step", count=30, timeout_s=300)
    cpus.kill_node(next(iter(cpus.nodes())))
    code, out, error = end(process, 500)
    assert code == 0, out + error
    for start in starts(recipe):
        assert start["workers"] == 4
        assert_no_group_is_split(start["nodes"], 2)
    assert len(starts(recipe)) == 2
    assert [step for step, _ in ledger(run.run)] == list(range(1, 201))
    cpus.await_nodes({}, timeout_s=120)


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("most_nodes", "steps", "workers"), [(1, 6, [2]), (2, 600, [2, 4])])
def test_an_elastic_run_begins_with_the_fewest_and_takes_what_else_there_can_be(
    tmp_path: Path, recipe: Path, most_nodes: int, steps: int, workers: list[int]
):
    cluster = Autoscaled(tmp_path, {"cpu": ({"CPU": 3}, most_nodes)})
    try:
        settings = (*GANGS, "parallel.min_workers=2", f"train.steps={steps}", "checkpoint.every_steps=100", "eval.rows=0")
        code, out, error = end(cluster.start(recipe, *settings), 500)
        assert code == 0, out + error
        assert [start["workers"] for start in starts(recipe)] == workers
        cluster.await_nodes({}, timeout_s=120)
    finally:
        cluster.close()


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_sweep_begins_without_nodes_and_leaves_none(tmp_path: Path):
    cluster = Autoscaled(tmp_path, {"cpu": ({"CPU": 3}, 2)})
    try:
        settings = {"train.steps": 12, "parallel.workers": 1, "eval.every_steps": 0, "checkpoint.every_steps": 0}
        path = write_sweep(tmp_path, set=settings, budget={"trials": 3, "max_concurrent": 2})
        environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
        process = start_sweep(path, command=(sys.executable, "-m", "jobs.pretrain", "--config"), **environment)
        code, out, error = end(process, 1000)
        assert code == 0 and "of 2 cpu nodes" in out, out + error
        assert (tmp_path / "runs" / "search" / "best.yaml").exists()
        cluster.await_nodes({}, timeout_s=120)
        code, out, error = end(cluster.start(tmp_path / "run.yaml", "run.name=after"), 300)
        assert code == 0, out + error  # what the trials left in Ray did not go with their nodes
    finally:
        cluster.close()
