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
