"""How many workers a run needs, what each asks for, and whether nodes have room for them. Pure.

A tensor group lies inside one node: it is asked for as one bundle, which Ray never splits.

Example: 4 workers, tensor=2, 1 window ahead: bundles {CPU: 2}, {CPU: 2}, {CPU: 1}. Two nodes of 3 CPUs have room: 2 + 1 and 2. Three
workers on one and one on the other would fill them too, and split a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.errors import ClusterError


@dataclass(frozen=True)
class Node:
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Needs:
    """What a run's configuration says. `windows_ahead`: logical CPUs for tokenizing, which the trainers do not hold."""

    workers: int
    tensor: int
    windows_ahead: int
    device: Literal["auto", "gpu", "cpu"] = "auto"


@dataclass(frozen=True)
class WorkerPlan:
    num_workers: int
    tensor: int
    windows_ahead: int
    cpus_per_worker: float
    gpus_per_worker: float

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What the run asks its cluster for: each bundle lies inside one node."""
        group = {"CPU": self.cpus_per_worker * self.tensor}
        if self.gpus_per_worker:
            group["GPU"] = self.gpus_per_worker * self.tensor
        return [group] * (self.num_workers // self.tensor) + [{"CPU": 1.0}] * self.windows_ahead

    def __str__(self) -> str:
        """'4 GPU workers in groups of 2'"""
        kind = "GPU" if self.gpus_per_worker else "CPU"
        groups = f" in groups of {self.tensor}, each on one node" if self.tensor > 1 else ""
        return f"{self.num_workers} {kind} worker{'s' if self.num_workers > 1 else ''}{groups}"


def total_cpus(workers: int, windows_ahead: int) -> int:
    """Logical CPUs that a run needs: one a worker, and one for each window tokenized at once, which the trainers do not hold. Without
    those it would wait for its first batch for ever. Re-cutting blocks takes turns with tokenizing: a process more costs 5 s of CPU time
    at start-up."""
    return workers + windows_ahead


def plan_workers(needs: Needs, on_gpus: bool) -> WorkerPlan:
    """One worker a GPU, or CPU workers of one logical CPU each."""
    return WorkerPlan(needs.workers, needs.tensor, needs.windows_ahead, 1.0, 1.0 if on_gpus else 0.0)


def takes_gpus(needs: Needs, nodes: Sequence[Node]) -> bool:
    """Whether workers are on GPUs where these nodes are all there is."""
    return needs.device == "gpu" or (needs.device == "auto" and any(node.gpus for node in nodes))


def group_places(plan: WorkerPlan, nodes: Sequence[Node]) -> list[int]:
    """The node of each tensor group, in as few nodes as possible; fewer than the plan's groups where no more fit."""
    rooms = [_groups_on(plan, node) for node in nodes]
    slots = [at for at in sorted(range(len(nodes)), key=lambda at: -rooms[at]) for _ in range(rooms[at])]
    return slots[: plan.num_workers // plan.tensor]


def has_room(plan: WorkerPlan, nodes: Sequence[Node]) -> bool:
    """Whether nodes of these sizes, empty, hold the plan."""
    cpus = sum(int(node.cpus) for node in nodes)
    groups = plan.num_workers // plan.tensor
    return len(group_places(plan, nodes)) == groups and cpus >= total_cpus(plan.num_workers, plan.windows_ahead)


def require_room(plan: WorkerPlan, nodes: Sequence[Node]) -> None:
    """Raises ClusterError, with the nearest legal value, where nodes of these sizes can never hold the plan, however empty they are."""
    if has_room(plan, nodes):
        return
    cpus, gpus = sum(int(node.cpus) for node in nodes), sum(node.gpus for node in nodes)
    groups, placed = plan.num_workers // plan.tensor, len(group_places(plan, nodes))
    needed, nearest = total_cpus(plan.num_workers, plan.windows_ahead), _nearest(plan, nodes)
    if plan.gpus_per_worker and gpus < plan.num_workers:
        told = f"parallel.workers={plan.num_workers} needs {plan.num_workers} GPUs, and the cluster has {gpus:g}"
        nearest = nearest if gpus else "Nearest legal value: parallel.device=cpu"
    elif cpus < needed:
        told = f"the run needs {needed} logical CPUs (its workers and its data tasks), and the cluster has {cpus:g}"
        nearest = f"Start the cluster with --num-cpus={needed} or more nodes, or lower parallel.workers or data.windows_ahead. {nearest}"
    elif not placed:
        told = (
            f"parallel.tensor={plan.tensor} needs a node of {_shape(plan)}, as a tensor group lies inside one, and the nodes are of "
            f"{_sizes(plan, nodes)}"
        )
    else:
        told = (
            f"parallel.workers={plan.num_workers} are {groups} tensor groups of {plan.tensor}, each inside one node of {_shape(plan)} for "
            f"each group, and the nodes, of {_sizes(plan, nodes)}, have room for {placed}"
        )
    raise ClusterError(f"{told}. {nearest}.")


def _nearest(plan: WorkerPlan, nodes: Sequence[Node]) -> str:
    """The plan that has room and is nearest: fewer workers, or smaller tensor groups, or both."""
    sizes = [size for size in range(plan.tensor, 0, -1) if plan.num_workers % size == 0]
    fewer = [replace(plan, num_workers=workers) for workers in range(plan.num_workers, 0, -plan.tensor)]
    smaller = [replace(plan, tensor=size) for size in sizes]
    both = [replace(plan, tensor=size, num_workers=workers) for size in sizes for workers in range(plan.num_workers, 0, -size)]
    found = next((each for each in (*fewer, *smaller, *both) if has_room(each, nodes)), None)
    if found is None:
        return "No number of workers has room: use larger nodes, or more of them"
    values = [f"parallel.workers={found.num_workers}"] if found.num_workers != plan.num_workers else []
    values += [f"parallel.tensor={found.tensor}"] if found.tensor != plan.tensor else []
    return f"Nearest legal value{'s' if len(values) > 1 else ''}: {' with '.join(values)}"


def _shape(plan: WorkerPlan) -> str:
    """What a tensor group takes of its node."""
    cpus = f"{plan.cpus_per_worker * plan.tensor:g} logical CPUs"
    return f"{plan.gpus_per_worker * plan.tensor:g} GPUs and {cpus}" if plan.gpus_per_worker else cpus


def _sizes(plan: WorkerPlan, nodes: Sequence[Node]) -> str:
    """'4 GPUs and 2 CPUs, or 0 GPUs and 16 CPUs'"""
    kinds = dict.fromkeys(f"{node.gpus:g} GPUs and {node.cpus:g} CPUs" if plan.gpus_per_worker else f"{node.cpus:g} CPUs" for node in nodes)
    return ", or ".join(kinds)


def _groups_on(plan: WorkerPlan, node: Node) -> int:
    by_cpu = int(node.cpus // (plan.cpus_per_worker * plan.tensor))
    return min(by_cpu, int(node.gpus // (plan.gpus_per_worker * plan.tensor))) if plan.gpus_per_worker else by_cpu


def concurrent_trials(limit: int | None, cpus: float, workers: int, cluster_cpus: float, cluster_gpus: float) -> int:
    """How many trials of so many CPUs and workers a cluster trains at once, at most `limit`: no trial's driver holds what another's workers
    wait for.

    Raises ClusterError where not one fits.
    """
    fit = int(cluster_cpus // cpus)
    if cluster_gpus:
        fit = min(fit, int(cluster_gpus // workers))
    if not fit:
        raise ClusterError(
            f"a trial needs {cpus:g} logical CPUs and {workers} workers, and the cluster has {cluster_cpus:g} CPUs and {cluster_gpus:g} "
            "GPUs. Add nodes, or lower parallel.workers or data.windows_ahead."
        )
    return min(fit, limit or fit)
