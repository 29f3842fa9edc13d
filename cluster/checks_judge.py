"""From what the nodes said to findings: every rule of `headrace doctor`. Pure.

A red finding is what a run would fail on, or what makes it unsafe; a yellow one what makes it slow or surprising.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.checks_facts import NodeFacts
from cluster.checks_reach import ClockOffset, Closed
from cluster.errors import ClusterError
from cluster.workers import Needs, Node, plan_workers, require_room, takes_gpus

Severity = Literal["red", "yellow", "green"]
SEVERITIES: tuple[Severity, ...] = ("red", "yellow", "green")
RED_EXIT_CODE = 3
ALL_NODES = "cluster"

CLOCK_RED_S = 2.0  # leases, the order of events and the tokens of jobs compare clocks of several machines
CLOCK_YELLOW_S = 0.5
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """`seen`: the value; `rule`: what it should be; `fix`: the nearest, empty for a green one."""

    severity: Severity
    node: str
    what: str
    seen: str
    rule: str
    fix: str = ""


@dataclass(frozen=True)
class NodeReport:
    """All that is known of a node. `silence`: why it told nothing; then nothing below counts. `storage_error`: None where it went well, or
    was not tried."""

    node: str
    address: str
    cpus: float = 0.0  # what Ray counts, as those below
    gpus: float = 0.0
    object_store_bytes: float = 0.0
    silence: str | None = None
    facts: NodeFacts | None = None
    clock: ClockOffset | None = None
    storage_error: str | None = None
    tried_ports: int = 0
    closed: tuple[Closed, ...] = ()


@dataclass(frozen=True)
class Bandwidth:
    """An all-reduce between `nodes` processes on as many nodes. `gb_per_s`: by bytes of the buffer, on the slowest rank. `busy`: it could
    not be tried, because the GPUs are in use."""

    nodes: int
    backend: str
    gb_per_s: dict[int, float]
    error: str | None = None
    busy: bool = False


@dataclass(frozen=True)
class Wanted:
    """What a run needs, or any. `versions`: the driver's. `free_bytes`: by what a disk is for; those not named need `least_free_bytes`.
    `storage`: the URI that every node must write, None: not checked. `needs`: the workers of a run, None: of none. `autoscaled`: whether
    nodes come when a run asks for them."""

    versions: dict[str, str | None]
    storage: str | None = None
    needs: Needs | None = None
    autoscaled: bool = False
    free_bytes: dict[str, int] | None = None
    least_free_bytes: int = 1 * GIB
    least_gb_per_s: float = 0.1


def judge(nodes: Sequence[NodeReport], bandwidth: Bandwidth | None, wanted: Wanted) -> list[Finding]:
    """One finding or more for each rule and node, red ones first."""
    found = [*_room(nodes, wanted)]
    for node in nodes:
        found += _of_node(node, wanted)
    found += _token(nodes)
    found += _same_gpus(nodes)
    if bandwidth is not None:
        found.append(_all_reduce(bandwidth, wanted))
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def exit_code(findings: Sequence[Finding]) -> int:
    """The exit code: RED_EXIT_CODE where a finding is red, else 0."""
    return RED_EXIT_CODE if any(finding.severity == "red" for finding in findings) else 0


def _of_node(node: NodeReport, wanted: Wanted) -> Iterator[Finding]:
    if node.silence is not None or node.facts is None:
        fix = "Look at the node's logs and its network; start it again if it hangs"
        if "ModuleNotFoundError" in (node.silence or ""):
            fix = "Install Headrace's checkout on this node, or have it brought: headrace submit doctor"
        yield Finding("red", node.node, "answer", node.silence or "told nothing", "every node runs a task in time", fix)
        return
    yield from _versions(node.node, node.facts, wanted)
    yield from _gpus(node, node.facts)
    yield from _disks(node.node, node.facts, wanted)
    yield from _shared_memory(node, node.facts)
    yield from _clock(node)
    yield from _ports(node)
    if wanted.storage is not None:
        rule = f"every node writes, reads and deletes in {wanted.storage}"
        if node.storage_error is None:
            yield Finding("green", node.node, "storage", "put, get, delete", rule)
        else:
            yield Finding("red", node.node, "storage", node.storage_error, rule, "Give this node's processes the rights or the mount")


def _versions(node: str, facts: NodeFacts, wanted: Wanted) -> Iterator[Finding]:
    wrong = False
    for name, mine in wanted.versions.items():
        here = facts.versions.get(name)
        rule = f"{name} {mine}, as where the driver runs" if mine else f"{name} is installed"
        if here is None or here != mine:
            wrong = True
            fix = f"Install {name}=={mine} on this node" if mine else f"Install {name} where the driver runs, then on all nodes"
            yield Finding("red", node, "versions", f"{name} {here or 'is missing'}", rule, fix)
    if not wrong:
        yield Finding("green", node, "versions", ", ".join(f"{name} {v}" for name, v in facts.versions.items()), "the driver's")


def _gpus(node: NodeReport, facts: NodeFacts) -> Iterator[Finding]:
    rule = "nvidia-smi sees the GPUs that Ray counts"
    if facts.gpu_error is not None:
        severity: Severity = "red" if node.gpus else "yellow"
        yield Finding(severity, node.node, "GPUs", facts.gpu_error, rule, "Install the driver that fits the kernel, or restart the node")
    elif len(facts.gpus) < node.gpus:
        fix = f"Start the node with --num-gpus={len(facts.gpus)}, or repair the driver"
        yield Finding("red", node.node, "GPUs", f"{len(facts.gpus)} of {node.gpus:g}", rule, fix)
    elif len(facts.gpus) > node.gpus:
        fix = f"Start the node with --num-gpus={len(facts.gpus)} to use them all"
        yield Finding("yellow", node.node, "GPUs", f"{len(facts.gpus)}, of which Ray uses {node.gpus:g}", rule, fix)
    else:
        seen = ", ".join(f"{gpu.name} (driver {gpu.driver}, sm {gpu.compute_capability})" for gpu in facts.gpus)
        yield Finding("green", node.node, "GPUs", seen or "none", rule)


def _disks(node: str, facts: NodeFacts, wanted: Wanted) -> Iterator[Finding]:
    for what, disk in facts.disks.items():
        needed = (wanted.free_bytes or {}).get(what, wanted.least_free_bytes)
        seen = f"{_size(disk.free_bytes)} free of {_size(disk.total_bytes)} at {disk.path}"
        rule = f"{_size(needed)} free"
        if disk.free_bytes < needed:
            yield Finding("red", node, f"disk: {what}", seen, rule, f"Free {_size(needed - disk.free_bytes)}, or name a larger disk")
        elif disk.free_bytes < 2 * needed:
            yield Finding(
                "yellow", node, f"disk: {what}", seen, f"twice {_size(needed)} free, for what else writes there", "Free some space"
            )
        else:
            yield Finding("green", node, f"disk: {what}", seen, rule)


def _shared_memory(node: NodeReport, facts: NodeFacts) -> Iterator[Finding]:
    rule = f"/dev/shm holds the object store ({_size(node.object_store_bytes)})"
    seen = "no /dev/shm" if facts.shm_bytes is None else _size(facts.shm_bytes)
    if (facts.shm_bytes or 0) < node.object_store_bytes:
        fix = f"Start the container with --shm-size={_size(node.object_store_bytes)}, or ray start --object-store-memory below it"
        yield Finding("red", node.node, "shared memory", seen, rule, fix)
    else:
        yield Finding("green", node.node, "shared memory", seen, rule)


def _clock(node: NodeReport) -> Iterator[Finding]:
    rule = f"within {CLOCK_RED_S:g} s of the driver's"
    if node.clock is None:
        yield Finding("red", node.node, "clock", "could not be read", rule, "Run the doctor again; look at the node's load")
        return
    offset_s, error_s = node.clock.offset_s, node.clock.error_s
    seen = f"{offset_s:+.3f} s (+- {error_s:.3f})"
    surely_s = abs(offset_s) - error_s
    fix = "Let chrony or systemd-timesyncd set this node's clock"
    if surely_s > CLOCK_RED_S:
        yield Finding("red", node.node, "clock", seen, rule, fix)
    elif surely_s > CLOCK_YELLOW_S:
        yield Finding("yellow", node.node, "clock", seen, f"within {CLOCK_YELLOW_S:g} s of the driver's, with NTP", fix)
    elif error_s > CLOCK_RED_S:
        yield Finding("yellow", node.node, "clock", seen, "a round trip that tells more", "Run the doctor again when the nodes are idle")
    else:
        yield Finding("green", node.node, "clock", seen, rule)


def _ports(node: NodeReport) -> Iterator[Finding]:
    for closed in node.closed:
        rule = f"this node reaches the {closed.what} of {closed.owner}"
        fix = f"Open {closed.where} for this node in the firewall, and see that the process behind it lives"
        yield Finding("red", node.node, "port", f"{closed.where}: {closed.why}", rule, fix)
    if not node.closed:
        yield Finding("green", node.node, "port", f"{node.tried_ports} open", "all nodes reach each other")


def _token(nodes: Sequence[NodeReport]) -> Iterator[Finding]:
    """Whoever reaches Ray's ports can run code, unless it asks for a token."""
    rule = "RAY_AUTH_MODE=token on every node"
    fix = "Set RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) for all nodes, then start Ray again"
    for node in nodes:
        if node.facts is None:
            continue
        if node.facts.auth_mode == "token":
            yield Finding("green", node.node, "token", "asked for", rule)
        else:
            severity: Severity = "yellow" if all(_is_loopback(each.address) for each in nodes) else "red"
            yield Finding(severity, node.node, "token", f"RAY_AUTH_MODE={node.facts.auth_mode}", rule, fix)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address == "localhost"


def _same_gpus(nodes: Sequence[NodeReport]) -> Iterator[Finding]:
    """A group goes at the pace of its slowest GPU."""
    kinds = {(gpu.name, gpu.compute_capability) for node in nodes if node.facts for gpu in node.facts.gpus}
    drivers = {gpu.driver for node in nodes if node.facts for gpu in node.facts.gpus}
    fix = "Run on nodes of one kind: with labels, or a cluster for each kind"
    if len(kinds) > 1:
        told = ", ".join(sorted(f"{name} (sm {capability})" for name, capability in kinds))
        yield Finding("yellow", ALL_NODES, "kinds of GPUs", told, "one kind", fix)
    if len(drivers) > 1:
        yield Finding("yellow", ALL_NODES, "GPU drivers", ", ".join(sorted(drivers)), "one driver", "Install one driver on all nodes")


def _room(nodes: Sequence[NodeReport], wanted: Wanted) -> Iterator[Finding]:
    """By the rule that the run goes by when it begins."""
    if wanted.needs is None:
        return
    sizes = [Node(node.cpus, node.gpus) for node in nodes]
    plan = plan_workers(wanted.needs, takes_gpus(wanted.needs, sizes))
    seen = ", ".join(f"{count} x {size.cpus:g} CPUs and {size.gpus:g} GPUs" for size, count in Counter(sizes).items())
    try:
        require_room(plan, sizes)
    except ClusterError as error:
        if wanted.autoscaled:
            fix = f"Nothing, if the autoscaler may start what is missing: it comes when a run asks. Else: {error}"
            yield Finding("yellow", ALL_NODES, "room", seen, f"room for {plan}", fix)
        else:
            yield Finding("red", ALL_NODES, "room", seen, f"room for {plan}", str(error))
    else:
        yield Finding("green", ALL_NODES, "room", seen, f"room for {plan}")


def _all_reduce(bandwidth: Bandwidth, wanted: Wanted) -> Finding:
    what, rule = f"{bandwidth.backend} all-reduce", f"{wanted.least_gb_per_s:g} GB/s or more between {bandwidth.nodes} nodes"
    if bandwidth.busy:
        return Finding(
            "yellow", ALL_NODES, what, bandwidth.error or "the GPUs are in use", rule, "Run the doctor when a GPU a node is free"
        )
    if bandwidth.error is not None:
        fix = "Let the nodes reach each other on all ports above 1024, and their host names resolve to an address that others reach"
        return Finding("red", ALL_NODES, what, bandwidth.error, f"a group of {bandwidth.nodes} nodes forms", fix)
    seen = ", ".join(f"{size / (1 << 20):g} MiB: {gb_per_s:.3f} GB/s" for size, gb_per_s in sorted(bandwidth.gb_per_s.items()))
    if bandwidth.gb_per_s[max(bandwidth.gb_per_s)] < wanted.least_gb_per_s:
        fix = "Look at the link between the nodes (ethtool, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) and at what else uses it"
        return Finding("yellow", ALL_NODES, what, seen, rule, fix)
    return Finding("green", ALL_NODES, what, seen, rule)


def _size(size_bytes: float) -> str:
    if size_bytes < GIB:
        return f"{size_bytes / (1 << 20):.0f} MiB"
    return f"{size_bytes / GIB:.1f} GiB"
