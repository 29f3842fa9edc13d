"""How many workers a run needs and what each asks for. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import ClusterError


@dataclass(frozen=True)
class WorkerPlan:
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float


def total_cpus(workers: int, windows_ahead: int) -> int:
    """Logical CPUs that a run needs: one a worker, and one for each window tokenized at once, which the trainers do not hold. Without
    those it would wait for its first batch for ever. Re-cutting blocks takes turns with tokenizing: a process more costs 5 s of CPU time
    at start-up."""
    return workers + windows_ahead


def plan_workers(workers: int, tensor: int, cluster_gpus: float) -> WorkerPlan:
    """One worker a GPU where the cluster has enough of them, else CPU workers of one logical CPU each.

    Raises ClusterError where the cluster has GPUs, but fewer than the run has workers.
    """
    if 0 < cluster_gpus < workers:
        legal = int(cluster_gpus) // tensor * tensor
        fix = f"Nearest legal value: parallel.workers={legal}" if legal else f"Lower parallel.tensor={tensor} too"
        raise ClusterError(f"parallel.workers={workers} needs {workers} GPUs, and the cluster has {cluster_gpus:g}. {fix}.")
    return WorkerPlan(workers, 1.0, 1.0 if cluster_gpus else 0.0)
