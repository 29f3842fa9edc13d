"""`headrace doctor` finds each planted fault, on the node that has it, and nothing else.

What is real: the versions are those that a node's processes see (a package's metadata earlier on their path); the full disk is a full
file system; the closed port is refused by the kernel though a raylet listens there; the S3 server refuses to write; the silent node's
raylet is stopped. The clock is planted in Python: `time.time` is 100 s ahead in every Python process of that node; the machine's clock is
not touched.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.planted import PlantedCluster, planted_cluster
from tests.cluster.walled import walled
from tests.ports import free_port
from tests.s3_server import start_s3_server
from tests.small_run import ROOT, write_small_run

CLOCK_AHEAD_S = 100


def sick_path(folder: Path) -> dict[str, str]:
    """The environment of a node whose processes find another deepspeed and another time."""
    info = folder / "deepspeed-0.18.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.1\n")
    (folder / "sitecustomize.py").write_text(f"import time\n_now = time.time\ntime.time = lambda: _now() + {CLOCK_AHEAD_S}\n")
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def reds(cluster: PlantedCluster, *options: str) -> set[tuple[str, str, str]]:
    """(node, what, seen) of the red findings, nodes as head, other or driver."""
    code, findings = cluster.doctor(*options)
    found = [each for each in findings if each["severity"] == "red"]
    assert code == (3 if found else 0)
    names = {each["node"]: "head" if "(head)" in each["node"] else "other" if "(" in each["node"] else each["node"] for each in findings}
    return {(names[each["node"]], each["what"], each["seen"]) for each in found}


def test_a_node_with_another_library_and_another_time_is_told_by_name(tmp_path: Path) -> None:
    with planted_cluster() as cluster:
        cluster.add(env=sick_path(tmp_path / "sick"))
        found = reds(cluster)
    assert {(node, what) for node, what, _ in found} == {("other", "versions"), ("other", "clock")}
    seen = {what: told for _, what, told in found}
    assert seen["versions"] == "deepspeed 0.18.1"
    assert abs(float(seen["clock"].split()[0]) - CLOCK_AHEAD_S) < 1


@pytest.mark.faults
def test_a_full_disk_and_a_closed_port_are_told_by_name(tmp_path: Path) -> None:
    recipe = write_small_run(tmp_path)
    with walled(tmp_path / "storage", 8 << 20) as machine, planted_cluster(machine.entering) as cluster:
        port = free_port()
        cluster.add(f"--object-manager-port={port}")
        options = ("--config", str(recipe), "--set", f"run.storage={tmp_path}/storage")
        assert reds(cluster, *options) == set()
        machine.fill()
        machine.close_port(port)
        found = reds(cluster, *options)
    names = {(node, what) for node, what, _ in found}
    full = {(node, what) for node in ("head", "other") for what in ("storage", "disk: run.storage")} | {("driver", "storage")}
    assert names == full | {("head", "port")}
    seen = {what: told for _, what, told in found}
    assert seen["port"] == f"127.0.0.1:{port}: Permission denied"
    assert "No space left on device" in seen["storage"] and seen["disk: run.storage"].startswith("0 MiB free of 8 MiB")


@pytest.mark.faults
def test_a_node_that_may_not_write_on_s3_is_told_by_name(tmp_path: Path) -> None:
    recipe = write_small_run(tmp_path)
    with start_s3_server(tmp_path / "s3") as server, planted_cluster(env=server.env) as cluster:
        server.client().create_bucket(Bucket="lake")
        options = ("--config", str(recipe), "--set", "run.storage=s3://lake/runs")
        assert reds(cluster, *options) == set()
        cluster.add(env=server.reader_env)
        ((node, what, seen),) = reds(cluster, *options)
        assert server.client().list_objects_v2(Bucket="lake")["KeyCount"] == 0
    assert (node, what) == ("other", "storage") and "AccessDenied" in seen


@pytest.mark.faults
def test_a_node_without_headrace_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()  # another package of that name, which comes before
    (tmp_path / "cluster" / "__init__.py").touch()
    with planted_cluster() as cluster:
        cluster.add(env={"PYTHONPATH": str(tmp_path)})
        done = cluster.told(cwd=Path("/"))  # not in the checkout, whose path Ray would hand to the nodes
    assert done.returncode == 3
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith("RED ") and ": answer: ModuleNotFoundError: No module named 'cluster.doctor'" in first
    assert not second.startswith("RED")


@pytest.mark.faults
def test_a_group_that_cannot_form_is_told() -> None:
    with planted_cluster() as cluster:
        cluster.add(env={"GLOO_SOCKET_IFNAME": "nowhere0"})
        found = reds(cluster, "--timeout", "15")
    ((node, what, seen),) = found
    assert (node, what) == ("cluster", "gloo all-reduce") and "nowhere0" in seen


@pytest.mark.faults
def test_a_node_that_does_not_answer_is_told_by_name() -> None:
    with planted_cluster() as cluster:
        raylet = cluster.raylet_of(cluster.add())
        os.kill(raylet.pid, signal.SIGSTOP)
        try:
            found = reds(cluster, "--timeout", "5")
        finally:
            os.kill(raylet.pid, signal.SIGCONT)
    assert ("other", "answer", "no answer within 5 s") in found


def test_a_cluster_that_asks_for_no_token_is_told(tmp_path: Path) -> None:
    open_to_all = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}
    with planted_cluster(env=open_to_all) as cluster:
        _, findings = cluster.doctor()
    (token,) = [each for each in findings if each["what"] == "token"]
    assert token["seen"] == "RAY_AUTH_MODE=disabled"
    assert token["severity"] == ("yellow" if token["node"].startswith("127.") else "red")
