"""Probes where the training would run: one Ray actor a rank, with a worker's resources and environment, ended after each probe.

A tensor group is one bundle of the placement group, so it lies inside one node. Fresh actors are fresh processes: one that runs out of
memory takes nothing with it but its own probe.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llm.errors import TrainingError
from llm.job import Job
from llm.parallel.mesh import Mesh
from llm.train.launch import KEEP_FREED_MEMORY, NO_GPUS, WorkerResources
from llm.train.tune.events import Event, ProbeTask, RankDiedError

PLACEMENT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class RayProbes:
    """Starts the probes of one run's layout; see `StartProbe` in llm/train/tune/collect.py."""

    job: Job  # with a fixed number of workers
    resources: WorkerResources

    @contextmanager
    def __call__(self, task: ProbeTask) -> Iterator[Sequence[Iterator[Event]]]:
        parallel = self.job.config.parallel
        meshes = [Mesh(rank, parallel.workers, parallel.tensor) for rank in range(parallel.workers)]
        bundle = {"CPU": self.resources.cpus * parallel.tensor}
        if self.resources.gpus:
            bundle["GPU"] = self.resources.gpus * parallel.tensor
        group = placement_group([bundle] * parallel.data_size, strategy="PACK")
        actors: list[Any] = []
        try:
            if not group.wait(PLACEMENT_TIMEOUT_S):
                raise TrainingError(f"the cluster gave no room for {parallel.workers} workers within {PLACEMENT_TIMEOUT_S:.0f} s")
            actors = [self._actor(group, mesh) for mesh in meshes]
            places: list[tuple[str, str, int]] = ray.get([actor.place.remote() for actor in actors])
            local_sizes = Counter(node for node, _, _ in places)
            _, address, port = places[0]
            yield [
                _events(actor.run.remote(self.job, mesh, replace(task, local_size=local_sizes[node]), address, port))
                for actor, mesh, (node, _, _) in zip(actors, meshes, places, strict=True)
            ]
        except RayError as error:
            raise TrainingError(f"a probe could not be started: {str(error).splitlines()[0]}") from None
        finally:
            for actor in actors:
                ray.kill(actor)
            remove_placement_group(group)
            _wait_gone(actors)

    def _actor(self, group: Any, mesh: Mesh) -> Any:
        return _Rank.options(
            num_cpus=self.resources.cpus,
            num_gpus=self.resources.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=mesh.data_rank),
            runtime_env={
                "worker_process_setup_hook": "llm.train.preload.begin",
                "env_vars": {} if self.resources.gpus else KEEP_FREED_MEMORY | NO_GPUS,
            },
        ).remote()


@ray.remote
class _Rank:
    def place(self) -> tuple[str, str, int]:
        """(the node, its address, a port that is free there)"""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, job: Job, mesh: Mesh, task: ProbeTask, address: str, port: int) -> Iterator[Event]:
        from llm.train.tune.probe import begin_process, probe

        # Ray shows a worker its own GPUs only: the first of them is this rank's.
        begin_process(mesh, address, port, 0, task.local_size)
        yield from probe(job, mesh, task)


def _events(references: Any) -> Iterator[Event]:
    """What an actor tells, as it tells it; RankDiedError where its process has ended."""
    try:
        for reference in references:
            yield ray.get(reference)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except (RayActorError, OutOfMemoryError, WorkerCrashedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RankDiedError(f"its process died: {(lines or [type(error).__name__])[0][:300]}") from None


def _wait_gone(actors: Sequence[Any], timeout_s: float = 30.0) -> None:
    """Returns when the processes of a probe are gone: their memory shall not count against the next probe's."""
    deadline_s = time.monotonic() + timeout_s
    for actor in actors:
        while time.monotonic() < deadline_s:
            try:
                ray.get(actor.place.remote(), timeout=max(0.1, deadline_s - time.monotonic()))
            except RayError:
                break
