"""Waits until the cluster has room for a plan, and has the autoscaler start the nodes for it.

What is asked for is one pending placement group of the plan's own bundles: so the autoscaler starts the nodes that Ray will use, and no
more, and Ray takes them all at once or none. Withdrawing it is removing it, which also happens when the driver dies.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cluster.autoscaler import Autoscaler, read_autoscaler
from cluster.connect import head_address, is_private
from cluster.errors import ClusterError, InfeasibleError
from cluster.workers import Needs, Node, WorkerPlan, concurrent_trials, plan_workers, require_room, takes_gpus, total_cpus

LOOK_S = 0.5
ANSWER_S = 60.0  # in which an autoscaler says whether it has nodes of a kind: its rounds are seconds apart
KEPT_VERSIONS = 100  # of the cluster's states before the one that the autoscaler went by: older ones are asked for no more
Bundle = dict[str, float]


@dataclass(frozen=True)
class Waiting:
    """How to wait, from now on. `show` gets a line whenever it changes; `watch` is called at each look, and what it raises ends it."""

    at_most_s: float
    show: Callable[[str], None]
    watch: Callable[[], None] = lambda: None
    began_s: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self.began_s > self.at_most_s


def await_workers(needs: Needs, waiting: Waiting) -> WorkerPlan:
    """The plan that the connected cluster has room for when this returns; a device of "auto" is GPUs where it has some or can start some.

    Raises ClusterError: at once where there is no autoscaler and the nodes are too small; as soon as the autoscaler says so, a few seconds,
    where it cannot start such nodes; after `waiting.at_most_s` with what is missing.
    """
    nodes = _nodes()
    on_gpus = takes_gpus(needs, nodes)
    manages = not is_private() and read_autoscaler(head_address()).manages
    if manages and needs.device == "auto" and not on_gpus:
        on_gpus = _can_start(plan_workers(needs, on_gpus=True).bundles, waiting.watch) or _can_start([{"GPU": 1.0}], waiting.watch)
        if not on_gpus:
            waiting.show("the cluster's autoscaler has no GPU nodes: the run will be on CPUs")
    plan = plan_workers(needs, on_gpus)
    if not manages:
        require_room(plan, nodes)
    if is_private():  # nobody else is there
        return plan
    lower = f"parallel.workers={needs.workers}" + (f" or parallel.tensor={needs.tensor}" if needs.tensor > 1 else "")
    lower += " or set parallel.device=cpu" if on_gpus else ""
    await_bundles(plan.bundles, str(plan), lower, waiting)
    return plan


def await_trials(limit: int | None, driver_cpus: int, needs: Needs, waiting: Waiting) -> int:
    """How many trials of a search the connected cluster trains at once, at most `limit`. Where an autoscaler starts nodes, `limit` of them
    are waited for, or one where there is no limit or not as many nodes can be.

    `needs`: of the largest trial; `driver_cpus`: of the process that waits for a trial's run. Raises ClusterError as `await_workers`.
    """
    manages = read_autoscaler(head_address()).manages
    if manages:
        plan = await_workers(needs, waiting)
        one = [*plan.bundles, {"CPU": float(driver_cpus)}]
        try:
            await_bundles(one * (limit or 1), f"{limit or 1} trials of {plan}", "budget.max_concurrent", waiting)
        except InfeasibleError:
            await_bundles(one, f"a trial of {plan}", "parallel.workers", waiting)
    nodes = _nodes()
    cpus = sum(node.cpus for node in nodes)
    if not manages:
        require_room(plan_workers(needs, takes_gpus(needs, nodes)), nodes)
    gpus = 0.0 if needs.device == "cpu" else sum(node.gpus for node in nodes)
    return concurrent_trials(limit, driver_cpus + total_cpus(needs.workers, needs.windows_ahead), needs.workers, cpus, gpus)


def await_cpus(wanted: int, waiting: Waiting) -> int:
    """How many tasks of one logical CPU the connected cluster runs at once. Where an autoscaler starts nodes, those for `wanted` tasks
    (data.windows_ahead) are waited for; raises ClusterError as `await_workers`."""
    if not is_private() and read_autoscaler(head_address()).manages:
        await_bundles([{"CPU": 1.0}] * wanted, f"{wanted} data tasks", f"data.windows_ahead={wanted}", waiting)
    return max(1, int(sum(node.cpus for node in _nodes())))


def await_bundles(bundles: Sequence[Bundle], told: str, lower: str, waiting: Waiting) -> None:
    """Returns when all of them have been placed, each inside one node, and gives their places back.

    `told`: for whom; `lower`: the keys to lower. Raises InfeasibleError where the autoscaler can start no such nodes, and nobody else uses
    any that may become free; ClusterError after `waiting.at_most_s`.
    """
    line, history, chance = "", History(), Chance()
    refused = (
        f"the cluster's autoscaler can start no nodes for {told}: no node type has {_shape(bundles[0])}, or max_workers allows too few "
        f"nodes for {_shapes(bundles)}"
    )
    with _asked(bundles) as group:
        while not group.wait(0):
            waiting.watch()
            seen = _look()
            history.add(seen)
            chance.look(seen, group.id.hex(), _in_use())
            if chance.is_none:
                raise InfeasibleError(
                    f"{refused}. Lower {lower}, or raise max_workers (Kubernetes: maxReplicas) or add a node type in the cluster's file."
                )
            missing = history.missing()
            before, line = line, f"waiting for {missing or f'room for {told}'}"
            if chance.is_others and not missing:
                line += f": {refused}, but others use the cluster and may leave room"
            if line != before:
                waiting.show(line)
            if waiting.is_over:
                failure = f" The cloud refused a node: {seen.failure}." if seen.failure else ""
                raise ClusterError(
                    f"still {line} after {waiting.at_most_s:g} s (parallel.wait_nodes_s).{failure} Raise it, add nodes, or lower {lower}."
                )
            time.sleep(LOOK_S)


def _can_start(bundles: Sequence[Bundle], watch: Callable[[], None]) -> bool:
    """Whether the autoscaler has nodes for it: it is asked, as nothing else tells its node types with every provider. Where it has, it
    starts them, and where they are not needed they go again when they were idle for a while."""
    asked_at, began_s = -1, time.monotonic()
    with _asked(bundles) as group:
        name = group.id.hex()
        while not group.wait(0):
            watch()
            seen = _look()
            if asked_at < 0 and name in seen.pending:
                asked_at = seen.version
            if 0 <= asked_at <= seen.considered:
                return name not in seen.refused
            if time.monotonic() - began_s > ANSWER_S:
                raise ClusterError(
                    f"the cluster's autoscaler has not said within {ANSWER_S:g} s whether it has GPU nodes. See its log on the head, or "
                    "set parallel.device=gpu or parallel.device=cpu."
                )
            time.sleep(LOOK_S)
    return True


@contextmanager
def _asked(bundles: Sequence[Bundle]) -> Iterator[Any]:
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(list(bundles), strategy="PACK")
    try:
        yield group
    finally:
        remove_placement_group(group)


def _look() -> Autoscaler:
    """What the autoscaler tells; nothing where the head does not answer just now: whether it is gone, `watch` says."""
    try:
        return read_autoscaler(head_address())
    except Exception:  # Ray raises many kinds here
        return Autoscaler(manages=False)


class Chance:
    """Whether there can be room for a placement group, by what the autoscaler told at each look. A refusal counts when a later round has
    confirmed it: what somebody has just given back, the last one did not know of."""

    def __init__(self) -> None:
        self._refused_since = self._idle_since = -1
        self.is_none = False  # it can start no nodes, and nobody uses any
        self.is_others = False  # it can start no nodes while others use the cluster

    def look(self, seen: Autoscaler, group: str, in_use: bool) -> None:
        """`group`: its id in hex; `in_use`: whether somebody holds CPUs or GPUs of the cluster. So will those whose nodes are coming."""
        in_use = in_use or bool(seen.pending - seen.refused - {group})
        if group not in seen.refused:
            self._refused_since = self._idle_since = -1
        elif self._refused_since < 0:
            self._refused_since = seen.version
        if in_use or self._refused_since < 0:
            self._idle_since = -1
        elif self._idle_since < 0:
            self._idle_since = seen.version
        self.is_none = 0 <= self._idle_since <= seen.considered
        self.is_others = in_use and 0 <= self._refused_since <= seen.considered


class History:
    """The nodes that lived at each look, so as to count those that are being started: the autoscaler tells them once a round, and some of
    them have come since."""

    def __init__(self) -> None:
        self._looks: list[Autoscaler] = []

    def add(self, seen: Autoscaler) -> None:
        if seen.version:  # else the head did not answer
            self._looks = [look for look in self._looks if look.version >= seen.considered - KEPT_VERSIONS] + [seen]

    def missing(self) -> str:
        """'2 of 4 gpu nodes'; empty where none is being started."""
        if not self._looks:
            return ""
        now = self._looks[-1]
        before = next((look for look in reversed(self._looks) if look.version <= now.considered), now)
        parts: list[str] = []
        for kind, starting in sorted(now.starting.items()):
            whole = before.alive.get(kind, 0) + starting
            if (left := whole - now.alive.get(kind, 0)) > 0:
                parts.append(f"{left} of {whole} {kind} node{'s' if whole > 1 else ''}")
        return " and ".join(parts)


def _in_use() -> bool:
    """Whether somebody holds CPUs or GPUs of the cluster: they may become free, so that a node of another type can be started."""
    import ray

    whole, free = ray.cluster_resources(), ray.available_resources()
    return any(free.get(name, 0.0) < whole.get(name, 0.0) for name in ("CPU", "GPU"))


def _nodes() -> list[Node]:
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def _shapes(bundles: Sequence[Bundle]) -> str:
    """'2 times 2 CPUs and 1 times 1 CPU'"""
    return " and ".join(f"{count} times {shape}" for shape, count in Counter(_shape(bundle) for bundle in bundles).items())


def _shape(bundle: Bundle) -> str:
    return " with ".join(f"{amount:g} {name}{'s' if amount > 1 else ''}" for name, amount in sorted(bundle.items(), reverse=True))
