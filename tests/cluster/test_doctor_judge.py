"""Every rule of the doctor, on both sides of its edge, without Ray; and what its pure parts compute."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from cluster.checks_facts import Disk, Gpu, NodeFacts, parse_gpus, versions
from cluster.checks_judge import GIB, Bandwidth, Finding, NodeReport, Wanted, exit_code, judge
from cluster.checks_reach import ClockOffset, Closed, Port, clock_offset, closed_ports, neighbours
from cluster.workers import Needs
from jobs.doctor import needs_of
from jobs.doctor_table import folded, show
from llm.config_file import load_run
from tests.small_run import ROOT

VERSIONS: dict[str, str | None] = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0"}
FACTS = NodeFacts(VERSIONS, {"home": Disk("/home", 50 * GIB, 100 * GIB)}, shm_bytes=GIB, auth_mode="token")
NODE = NodeReport(
    "10.0.0.2 (a1b2c3)", "10.0.0.2", cpus=4, object_store_bytes=GIB, facts=FACTS, clock=ClockOffset(0.001, 0.001), tried_ports=5
)
WANTED = Wanted(VERSIONS, storage="s3://lake/runs", needs=Needs(2, 1, 2, "cpu"))
BANDWIDTH = Bandwidth(2, "gloo", {1 << 20: 0.2, 64 << 20: 0.5})
H100 = Gpu("NVIDIA H100", "570.1", "9.0", 81559)


def facts(**changes: Any) -> NodeReport:
    return replace(NODE, facts=replace(FACTS, **changes))


def judged(*nodes: NodeReport, bandwidth: Bandwidth | None = BANDWIDTH, **wanted: Any) -> list[Finding]:
    return judge(nodes or (NODE,), bandwidth, replace(WANTED, **wanted))


def not_green(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.severity, finding.what) for finding in found if finding.severity != "green"]


def test_a_sound_cluster_is_all_green_and_each_rule_spoke():
    found = judged()
    assert not_green(found) == [] and exit_code(found) == 0
    assert {f.what for f in found} == {
        *("room", "versions", "GPUs", "disk: home", "shared memory", "clock", "port", "storage", "token", "gloo all-reduce")
    }


def disk(free_bytes: int) -> NodeReport:
    return facts(disks={"home": Disk("/home", free_bytes, 100 * GIB)})


PLANTED = [
    (replace(NODE, facts=None, silence="no answer within 60 s"), ("red", "answer")),
    (facts(versions={**VERSIONS, "torch": "2.12.0"}), ("red", "versions")),
    (facts(versions={**VERSIONS, "torch": None}), ("red", "versions")),
    (disk(GIB - 1), ("red", "disk: home")),
    (disk(2 * GIB - 1), ("yellow", "disk: home")),
    (facts(shm_bytes=GIB - 1), ("red", "shared memory")),
    (facts(shm_bytes=None), ("red", "shared memory")),
    (replace(NODE, clock=ClockOffset(2.2, 0.1)), ("red", "clock")),
    (replace(NODE, clock=ClockOffset(-2.2, 0.1)), ("red", "clock")),
    (replace(NODE, clock=ClockOffset(0.7, 0.1)), ("yellow", "clock")),
    (replace(NODE, clock=ClockOffset(0.0, 3.0)), ("yellow", "clock")),
    (replace(NODE, clock=None), ("red", "clock")),
    (replace(NODE, closed=(Closed("head", "raylet", "10.0.0.1:40001", "no answer"),)), ("red", "port")),
    (replace(NODE, storage_error="access denied"), ("red", "storage")),
    (facts(auth_mode="disabled"), ("red", "token")),
    (replace(facts(auth_mode="disabled"), address="127.0.0.1"), ("yellow", "token")),
    (replace(facts(gpus=(H100,)), gpus=2), ("red", "GPUs")),
    (replace(facts(gpus=(H100, H100)), gpus=1), ("yellow", "GPUs")),
    (replace(facts(gpu_error="driver mismatch"), gpus=1), ("red", "GPUs")),
    (facts(gpu_error="driver mismatch"), ("yellow", "GPUs")),
]


@pytest.mark.parametrize(("node", "told"), PLANTED, ids=[f"{told[1]}-{told[0]}-{i}" for i, (_, told) in enumerate(PLANTED)])
def test_each_fault_of_a_node_is_told_by_its_name_and_nothing_else_is(node: NodeReport, told: tuple[str, str]):
    found = judged(node)
    assert not_green(found) == [told]
    assert (found[0].severity, found[0].what) == told and found[0].fix
    assert exit_code(found) == (3 if told[0] == "red" else 0)


def test_a_node_without_headrace_is_told_how_to_get_it():
    (found,) = [
        f for f in judged(replace(NODE, facts=None, silence="ModuleNotFoundError: No module named 'cluster'")) if f.severity == "red"
    ]
    assert found.what == "answer" and found.fix.startswith("Install Headrace")


JUST_SOUND = [
    disk(2 * GIB),
    facts(shm_bytes=GIB),
    replace(NODE, clock=ClockOffset(0.5, 0.0)),
    replace(NODE, clock=ClockOffset(2.5, 2.0)),
    replace(facts(gpus=(H100,)), gpus=1),
]


@pytest.mark.parametrize("node", JUST_SOUND)
def test_what_just_keeps_a_rule_is_green(node: NodeReport):
    assert not_green(judged(node)) == []


def test_a_clock_is_off_only_by_what_the_round_trip_leaves_no_doubt_of():
    assert not_green(judged(replace(NODE, clock=ClockOffset(3.9, 1.9)))) == [("yellow", "clock")]
    assert not_green(judged(replace(NODE, clock=ClockOffset(4.0, 1.9)))) == [("red", "clock")]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"needs": None}, []),
        ({"needs": Needs(3, 1, 2)}, [("red", "room")]),
        ({"needs": Needs(3, 1, 2), "autoscaled": True}, [("yellow", "room")]),
        ({"needs": Needs(2, 2, 2, "gpu")}, [("red", "room")]),
        ({"bandwidth": replace(BANDWIDTH, gb_per_s={}, error="2 of 2 ranks failed")}, [("red", "gloo all-reduce")]),
        ({"bandwidth": replace(BANDWIDTH, gb_per_s={}, error="no GPU", busy=True)}, [("yellow", "gloo all-reduce")]),
        ({"bandwidth": replace(BANDWIDTH, gb_per_s={1 << 20: 0.5, 64 << 20: 0.09})}, [("yellow", "gloo all-reduce")]),
        ({"bandwidth": replace(BANDWIDTH, gb_per_s={1 << 20: 0.01, 64 << 20: 0.1})}, []),
        ({"bandwidth": None}, []),
        ({"free_bytes": {"home": 50 * GIB + 1}}, [("red", "disk: home")]),
        ({"free_bytes": {"home": 25 * GIB}}, []),
    ],
)
def test_what_the_cluster_as_a_whole_must_have(changes: dict[str, Any], told: list[tuple[str, str]]):
    assert not_green(judged(**changes)) == told


def test_mixed_gpus_and_drivers_are_yellow():
    old = Gpu("NVIDIA A100", "560.2", "8.0", 40960)
    found = judged(replace(facts(gpus=(H100,)), gpus=1), replace(facts(gpus=(old,)), gpus=1))
    assert not_green(found) == [("yellow", "kinds of GPUs"), ("yellow", "GPU drivers")]


@pytest.mark.parametrize(
    ("needs", "told"),
    [
        (Needs(2, 1, 1), "needs 2 GPUs, and the cluster has 1"),  # auto: GPUs, as there is one
        (Needs(2, 1, 1, "cpu"), ""),
        (Needs(4, 4, 1, "cpu"), "needs a node of 4 logical CPUs"),  # enough in all, but on no node
    ],
)
def test_room_is_judged_as_a_run_judges_it(needs: Needs, told: str):
    nodes = (replace(NODE, cpus=3), replace(facts(gpus=(H100,)), cpus=3, gpus=1))
    rooms = [finding for finding in judged(*nodes, needs=needs) if finding.what == "room"]
    assert [finding.severity for finding in rooms] == ["red" if told else "green"] and told in rooms[0].fix


def test_storage_is_not_judged_where_no_run_names_one():
    assert "storage" not in {f.what for f in judged(storage=None)}


def test_a_run_needs_room_for_the_checkpoints_that_it_keeps_and_the_one_being_written():
    keys = ("model.preset=llama_8b", "run.storage=/data", "checkpoint.keep=3", "parallel.workers=2", "data.windows_ahead=1")
    wanted = needs_of(load_run(str(ROOT / "jobs/recipes/tiny_cpu.yaml"), keys), 0.1)
    assert wanted.free_bytes == {"run.storage": 8_030_261_248 * 12 * 4}
    assert (wanted.storage, wanted.needs) == ("/data", Needs(2, 1, 1))


def test_nvidia_smi_is_read():
    assert parse_gpus("NVIDIA H100, 570.1, 9.0, 81559\n\n") == (H100,)


def test_versions_are_those_of_the_installed_packages():
    import pyarrow

    assert versions()["pyarrow"] == pyarrow.__version__


def test_the_shortest_round_trip_tells_the_offset():
    assert clock_offset([(100.0, 109.0, 104.0), (200.0, 207.1, 200.2)]).offset_s == pytest.approx(7.0)
    assert clock_offset([(100.0, 109.0, 104.0), (200.0, 207.1, 200.2)]).error_s == pytest.approx(0.1)


def test_neighbours_are_all_others_or_a_ring():
    assert [neighbours(3, i, 16) for i in range(3)] == [[1, 2], [2, 0], [0, 1]]
    assert neighbours(1, 0, 16) == [] and neighbours(5, 3, at_most=2) == [4, 0]
    tried = [j for i in range(100) for j in neighbours(100, i, 16)]
    assert all(tried.count(j) == 16 for j in range(100))


def test_ports_are_tried_for_real():
    with socket.socket() as listens, socket.socket() as deaf, socket.socket() as filler:
        listens.bind(("127.0.0.1", 0))
        listens.listen()
        deaf.bind(("127.0.0.1", 0))  # bound, and listening to nobody
        full = socket.socket()
        full.bind(("127.0.0.1", 0))
        full.listen(0)  # whose queue one connection fills: the kernel then drops the next, as a firewall does
        filler.connect(full.getsockname())
        ports = [Port("head", what, *s.getsockname()) for what, s in (("open", listens), ("refused", deaf), ("dropped", full))]
        found = closed_ports(ports, connect_s=0.5)
        full.close()
    assert [(closed.what, closed.why) for closed in found] == [("refused", "Connection refused"), ("dropped", "no answer")]


def test_the_table_folds_green_lines_only_and_says_red_first(capsys: pytest.CaptureFixture[str]):
    bad = replace(NODE, node="10.0.0.3 (b)", storage_error="access denied")
    found = judged(NODE, bad, replace(NODE, node="10.0.0.4 (c)"))
    assert [f.node for f in folded(found) if f.what == "storage"] == ["10.0.0.3 (b)", "2 nodes"]
    show(found, ["a note"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("RED    10.0.0.3 (b): storage: access denied; rule: ") and "; fix: " in lines[0]
    assert lines[-2:] == ["a note", f"1 red, 0 yellow, {len(found) - 1} green"]
    assert not any(line.startswith(("RED", "YELLOW")) for line in lines[1:])


def test_on_a_terminal_it_is_one_table():
    console = Console(force_terminal=True, width=200, color_system=None, _environ={})
    with console.capture() as captured:
        show(judged(replace(NODE, clock=None)), [], console)
    told = captured.get()
    assert told.count("┏") == 1 and told.index("RED") < told.index("GREEN") and "could not be read" in told
