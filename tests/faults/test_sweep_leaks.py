"""A sweep on a cluster that outlives it: what its trials held is given back, while it runs and after."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.nodes import Nodes
from tests.search.sweeps import start_sweep, write_sweep

PRETRAIN = (sys.executable, "-m", "jobs.pretrain", "--config")
HELD = """
import sys, ray
from ray._private.state import state
ray.init(address=sys.argv[1], log_to_driver=False)
places = [each for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"]
# Ray Data has one of each in every cluster, detached and without resources: they are the cluster's, not the sweep's.
of_the_cluster = ("_AutoscalingCoordinatorActor", "_StatsActor")
names = [each["ActorClassName"] for each in state.actor_table(None).values() if each["State"] != "DEAD"]
actors = [name for name in names if name not in of_the_cluster]
print(len(places), len(actors), actors)
"""


def held(address: str) -> tuple[int, int]:
    """Placement groups and actors that are there."""
    told = subprocess.run([sys.executable, "-c", HELD, address], capture_output=True, text=True, timeout=120, check=True).stdout
    places, actors = told.splitlines()[-1].split()[:2]
    print(told.splitlines()[-1])
    return int(places), int(actors)


def nothing_held(address: str) -> bool:
    """Whether nothing is there within a minute."""
    deadline = time.monotonic() + 60
    while (found := held(address)) != (0, 0) and time.monotonic() < deadline:
        time.sleep(2)
    return found == (0, 0)


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_paused_stopped_finished_and_interrupted_trials_hold_nothing(nodes: Nodes, tmp_path: Path) -> None:
    nodes.add(cpus=8)
    folder = tmp_path / "sweep"
    folder.mkdir()
    grid = {"train.lr": {"grid": [0.01, 1e-5, 2e-5, 0.02]}}
    settings = {"train.steps": 60, "parallel.workers": 2, "eval.every_steps": 0, "checkpoint.every_steps": 0, "export.enabled": False}
    path = write_sweep(folder, space=grid, search={"searcher": "grid"}, set=settings, budget={"trials": 4, "max_concurrent": 1})
    journal = folder / "runs" / "search" / "sweep.jsonl"
    environment = {"RAY_ADDRESS": nodes.cluster.address, "RAY_AUTH_MODE": "disabled"}

    def begun() -> int:
        rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
        return sum(row["kind"] == "trial" for row in rows)

    process = start_sweep(path, command=PRETRAIN, **environment)
    try:
        deadline = time.monotonic() + 900
        while begun() < 3:  # one at a time: two have come to their rung and pause
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
            time.sleep(0.5)
        places, _ = held(nodes.cluster.address)
        assert places <= 3, "of Tune and of Train, for the trial that runs and the one that has just begun"
        process.terminate()
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130, err[-3000:]
        assert nothing_held(nodes.cluster.address), "interrupted"
        process = start_sweep(path, command=PRETRAIN, **environment)
        _, err = process.communicate(timeout=900)
        assert process.returncode == 0, err[-3000:]
        assert nothing_held(nodes.cluster.address), "finished"
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
