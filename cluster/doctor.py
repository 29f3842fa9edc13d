"""Asks every node of the connected cluster for what `cluster/checks_judge.py` judges.

One actor a node, pinned to it and without logical CPUs, so that a busy cluster answers too. Nothing here waits for ever: what does not
answer in time is a finding itself.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from cluster.checks_facts import NodeFacts, node_facts
from cluster.checks_judge import Bandwidth, NodeReport
from cluster.checks_reach import ClockOffset, Closed, Port, clock_offset, closed_ports, neighbours

CLOCK_ROUNDS = 8
MAX_NEIGHBOURS = 16  # whom each node tries to reach: all of them would be a million connections for a thousand nodes
HEAD_RESOURCE = "node:__internal_head__"

# (rank, world size, host:port, backend, time-out in s) -> GB/s by the bytes of the buffer. Given by the job, because it needs torch.
Measure = Callable[[int, int, str, str, float], dict[int, float]]


@dataclass(frozen=True)
class Examination:
    nodes: tuple[NodeReport, ...]
    bandwidth: Bandwidth | None


def examine(places: Mapping[str, str], check_storage: Callable[[], None] | None, measure: Measure, timeout_s: float) -> Examination:
    """What all alive nodes told, each step within `timeout_s`. `places`: folders whose disks count, by what they are for. `check_storage`
    runs on every node and raises what is wrong. `measure` runs on all nodes at once; with one node there is no bandwidth."""
    import ray

    rows = sorted((row for row in ray.nodes() if row["Alive"]), key=lambda row: HEAD_RESOURCE not in row["Resources"])
    reports = [_report(row) for row in rows]
    with _probes([row["NodeID"] for row in rows]) as probes:
        told = _gather([probe.facts.remote(dict(places)) for probe in probes], timeout_s)
        reports = [_with_facts(report, answer) for report, answer in zip(reports, told, strict=True)]
        alive = [i for i, report in enumerate(reports) if report.facts is not None]
        for i in alive:
            reports[i] = replace(reports[i], clock=_clock_of(probes[i], timeout_s))
        _reach(rows, reports, probes, alive, timeout_s)
        if check_storage is not None:
            for i, answer in zip(alive, _gather([probes[i].attempt.remote(check_storage) for i in alive], timeout_s), strict=True):
                reports[i] = replace(reports[i], storage_error=answer.error or answer.value[1])
        bandwidth = None
        if len(alive) > 1:
            bandwidth = _bandwidth(measure, [rows[i] for i in alive], [probes[i] for i in alive], timeout_s)
    return Examination(tuple(reports), bandwidth)


class Probe:
    """Runs on a node. Its methods may run at once: while it asks its neighbours, they ask it."""

    def facts(self, places: dict[str, str]) -> NodeFacts:
        return node_facts(places)

    def clock(self) -> float:
        return time.time()

    def ports(self, ports: list[Port]) -> tuple[Closed, ...]:
        return closed_ports(ports)

    def peers(self, peers: list[tuple[str, Any]], timeout_s: float) -> tuple[Closed, ...]:
        """Those of the named probes whose worker process this one cannot call."""
        answers = _gather([peer.clock.remote() for _, peer in peers], timeout_s)
        where = "its workers' ports (--min-worker-port to --max-worker-port)"
        named = zip(peers, answers, strict=True)
        return tuple(Closed(owner, "workers", where, answer.error) for (owner, _), answer in named if answer.error)

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def attempt(self, act: Callable[..., Any], *values: Any) -> tuple[Any, str | None]:
        """(what it returns, None), or (None, why it did not): an error of another node's libraries may not survive the way back."""
        try:
            return act(*values), None
        except Exception as error:
            return None, _first_line(error)


@dataclass(frozen=True)
class _Answer:
    value: Any = None
    error: str | None = None


def _gather(refs: list[Any], timeout_s: float) -> list[_Answer]:
    """The answers that come within `timeout_s`, in order; for the others, why they did not."""
    import ray

    if not refs:
        return []
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    done = set(ready)
    return [_answer(ref) if ref in done else _Answer(error=f"no answer within {timeout_s:g} s") for ref in refs]


def _answer(ref: Any) -> _Answer:
    import ray

    try:
        return _Answer(ray.get(ref))
    except Exception as error:  # Ray raises what the node raised, and kinds of its own
        return _Answer(error=_first_line(error))


def _first_line(error: Exception) -> str:
    """Ray wraps an error in pages of traceback: then it is the last line that names one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return (named[-1] if len(lines) > 1 and named else lines[0])[:300]


@contextmanager
def _probes(node_ids: list[str], gpus: float = 0.0) -> Iterator[list[Any]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(Probe)
    probes: list[Any] = []
    try:
        for node_id in node_ids:
            pinned = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
            probes.append(remote.options(num_cpus=0, num_gpus=gpus, max_concurrency=4, scheduling_strategy=pinned).remote())
        yield probes
    finally:
        for probe in probes:
            ray.kill(probe)


def _report(row: dict[str, Any]) -> NodeReport:
    address, resources = row["NodeManagerAddress"], row["Resources"]
    name = "head" if HEAD_RESOURCE in resources else row["NodeID"][:6]
    counted = (resources.get(kind, 0.0) for kind in ("CPU", "GPU", "object_store_memory"))
    return NodeReport(f"{address} ({name})", address, *counted)


def _with_facts(report: NodeReport, answer: _Answer) -> NodeReport:
    return replace(report, facts=answer.value, silence=answer.error)


def _clock_of(probe: Any, timeout_s: float) -> ClockOffset | None:
    """None where a round is not over in time."""
    import ray

    rounds: list[tuple[float, float, float]] = []
    for _ in range(CLOCK_ROUNDS):
        asked_at_s, began_s = time.time(), time.perf_counter()
        try:
            told_at_s: Any = ray.get(probe.clock.remote(), timeout=timeout_s)
        except Exception:  # it answered a moment ago
            return None
        rounds.append((asked_at_s, told_at_s, asked_at_s + time.perf_counter() - began_s))
    return clock_offset(rounds)


def _reach(rows: list[dict[str, Any]], reports: list[NodeReport], probes: list[Any], alive: list[int], timeout_s: float) -> None:
    """Puts into `reports` which ports each node tried and which were closed: the head's, its neighbours', their workers'."""
    everyones = _head_ports(rows[0]["NodeManagerAddress"])
    ports: list[list[Port]] = []
    peers: list[list[tuple[str, Any]]] = []
    for i in alive:
        near = neighbours(len(rows), i, MAX_NEIGHBOURS)
        local = [
            port for port in everyones if i == 0 or not port.host.startswith("127.") or rows[i]["NodeManagerAddress"].startswith("127.")
        ]
        ports.append(local + [port for j in near for port in _node_ports(reports[j].node, rows[j])])
        peers.append([(reports[j].node, probes[j]) for j in near if j in alive])
    tried = _gather([probes[i].ports.remote(each) for i, each in zip(alive, ports, strict=True)], timeout_s)
    called = _gather([probes[i].peers.remote(each, timeout_s / 2) for i, each in zip(alive, peers, strict=True)], timeout_s)
    for place, i in enumerate(alive):
        closed: list[Closed] = []
        for answer in (tried[place], called[place]):
            closed += [Closed("all", "ports", "the check", answer.error)] if answer.error else answer.value
        reports[i] = replace(reports[i], tried_ports=len(ports[place]) + len(peers[place]), closed=tuple(closed))


def _head_ports(head: str) -> list[Port]:
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    found = [Port("head", "control service (GCS)", host.strip("[]") or head, int(port))]
    if dashboard := _internal_kv_get("webui:url", namespace=b"dashboard"):  # empty where the head serves none
        host, _, port = dashboard.decode().rpartition(":")
        found.append(Port("head", "jobs and dashboard server", host.strip("[]"), int(port)))
    return found


def _node_ports(owner: str, row: dict[str, Any]) -> list[Port]:
    address = row["NodeManagerAddress"]
    return [
        Port(owner, "raylet", address, row["NodeManagerPort"]),
        Port(owner, "object manager", address, row["ObjectManagerPort"]),
    ]


def _bandwidth(measure: Measure, rows: list[dict[str, Any]], probes: list[Any], timeout_s: float) -> Bandwidth:
    """NCCL, with a GPU of each node, where all have one; else gloo."""
    if all(row["Resources"].get("GPU") for row in rows):
        with _probes([row["NodeID"] for row in rows], gpus=1.0) as on_gpus:
            placed = _gather([probe.clock.remote() for probe in on_gpus], timeout_s)
            if waiting := [answer.error for answer in placed if answer.error]:
                return Bandwidth(len(rows), "nccl", {}, f"{len(waiting)} nodes gave no GPU: {waiting[0]}", busy=True)
            return _measured(measure, "nccl", rows, on_gpus, timeout_s)
    return _measured(measure, "gloo", rows, probes, timeout_s)


def _measured(measure: Measure, backend: str, rows: list[dict[str, Any]], probes: list[Any], timeout_s: float) -> Bandwidth:
    count = len(probes)
    found = _gather([probes[0].free_port.remote()], timeout_s)[0]
    if found.error:
        return Bandwidth(count, backend, {}, found.error)
    where = f"{rows[0]['NodeManagerAddress']}:{found.value}"
    refs = [probe.attempt.remote(measure, rank, count, where, backend, timeout_s) for rank, probe in enumerate(probes)]
    answers = _gather(refs, timeout_s + 10)  # so that a group that does not form says so itself
    failures = {_report(row).node: answer.error or answer.value[1] for row, answer in zip(rows, answers, strict=True)}
    failures = {node: why for node, why in failures.items() if why}
    if failures:
        # The ranks that only waited say little; what broke says more.
        node, why = min(failures.items(), key=lambda each: any(word in each[1].lower() for word in ("timeout", "timed out", "no answer")))
        return Bandwidth(count, backend, {}, f"{len(failures)} of {count} ranks failed, {node}: {why}")
    speeds = [answer.value[0] for answer in answers]
    return Bandwidth(count, backend, {size: min(speed[size] for speed in speeds) for size in speeds[0]})
