"""How many workers a run needs, what each asks for, and whether nodes have room for them. Pure.

A tensor group lies inside one node: it is asked for as one bundle, which Ray never splits.

Example: 4 workers, tensor=2, 1 window ahead: bundles {CPU: 2}, {CPU: 2}, {CPU: 1}. Two nodes of 3 CPUs have room: 2 + 1 and 2. Three
workers on one and one on the other would fill them too, and split a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


def group_places(plan: WorkerPlan, nodes: Sequence[Node]) -> list[int]:
    """The node of each tensor group, in as few nodes as possible; fewer than the plan's groups where no more fit."""
    rooms = [_groups_on(plan, node) for node in nodes]
    slots = [at for at in sorted(range(len(nodes)), key=lambda at: -rooms[at]) for _ in range(rooms[at])]
    return slots[: plan.num_workers // plan.tensor]


def require_room(plan: WorkerPlan, nodes: Sequence[Node]) -> None:
    """Raises ClusterError, with the nearest legal value, where nodes of these sizes can never hold the plan, however empty they are."""
    cpus, gpus = sum(int(node.cpus) for node in nodes), sum(node.gpus for node in nodes)
    groups, placed = plan.num_workers // plan.tensor, len(group_places(plan, nodes))
    needed = total_cpus(plan.num_workers, plan.windows_ahead)
    of_gpus = plan.gpus_per_worker > 0
    unit = "GPUs" if of_gpus else "logical CPUs"
    if placed == groups and cpus >= needed:
        return
    if of_gpus and gpus < plan.num_workers:
        legal = int(gpus) // plan.tensor * plan.tensor
        fix = f"Nearest legal value: parallel.workers={legal}" if legal else f"Lower parallel.tensor={plan.tensor} too"
        fix = fix if gpus else "Nearest legal value: parallel.device=cpu"
        raise ClusterError(f"parallel.workers={plan.num_workers} needs {plan.num_workers} GPUs, and the cluster has {gpus:g}. {fix}.")
    if cpus < needed:
        raise ClusterError(
            f"the run needs {needed} logical CPUs (its workers and its data tasks), and the cluster has {cpus:g}. "
            f"Start the cluster with --num-cpus={needed} or more nodes, or lower parallel.workers or data.windows_ahead."
        )
    if not placed:
        largest = max(int(node.gpus if of_gpus else node.cpus) for node in nodes)
        legal = max(size for size in range(1, largest + 1) if plan.num_workers % size == 0)
        raise ClusterError(
            f"parallel.tensor={plan.tensor} needs a node of {plan.tensor} {unit}, as a tensor group lies inside one, and the largest node "
            f"has {largest}. Nearest legal value: parallel.tensor={legal}."
        )
    raise ClusterError(
        f"parallel.workers={plan.num_workers} are {groups} tensor groups of {plan.tensor}, each inside one node, and the nodes have room "
        f"for {placed}. Nearest legal value: parallel.workers={placed * plan.tensor}. Or use nodes whose number of {unit} is a multiple of "
        f"parallel.tensor={plan.tensor}."
    )


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
