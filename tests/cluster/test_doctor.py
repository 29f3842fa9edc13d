"""`headrace doctor` on real Ray nodes: a sound cluster is green, a stranger gets one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.planted import PlantedCluster, planted_cluster
from tests.ports import free_port
from tests.small_run import write_small_run


@pytest.fixture(scope="module")
def cluster() -> Iterator[PlantedCluster]:
    with planted_cluster() as found:
        found.add()
        yield found


def test_a_clean_cluster_is_all_green(cluster: PlantedCluster, tmp_path: Path) -> None:
    recipe = write_small_run(tmp_path)
    code, findings = cluster.doctor("--config", str(recipe), "--set", f"run.storage={tmp_path}/runs")
    assert [each for each in findings if each["severity"] != "green"] == [] and code == 0
    nodes = {each["node"] for each in findings} - {"cluster"}
    assert len(nodes) == 2
    for what in ("versions", "GPUs", "disk: run.storage", "disk: home", "shared memory", "clock", "port", "storage", "token"):
        assert {each["node"] for each in findings if each["what"] == what} == nodes, what
    speed = next(each for each in findings if each["what"] == "gloo all-reduce")
    assert "64 MiB" in speed["seen"] and "between 2 nodes" in speed["rule"]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    "stranger", [{"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}, {"RAY_AUTH_TOKEN": "0" * 64}], ids=["missing token", "wrong token"]
)
def test_a_client_without_the_token_gets_one_clear_line(cluster: PlantedCluster, stranger: dict[str, str]) -> None:
    done = cluster.told(env=stranger)
    assert done.returncode == 3 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"error: the cluster at {cluster.address} refuses this client's token, or that there is none. Set RAY_AUTH_MODE=token"
    )


def test_no_head_is_one_clear_line(cluster: PlantedCluster) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    done = cluster.told("--address", nobody)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: no head answers at {nobody} (Connection refused)")
    code, findings = cluster.doctor("--address", nobody)
    assert code == 3 and [each["what"] for each in findings] == ["connection"]
