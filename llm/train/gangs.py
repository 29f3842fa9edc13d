"""Ray Train's worker group, where a tensor group is one bundle of the placement group: Ray never splits a bundle over nodes.

With a bundle a worker, Ray fills nodes as it likes: of two tensor groups of 2 on nodes of 3 CPUs it would put 3 workers on one and 1 on
the other.
"""

from __future__ import annotations

from typing import Any

from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.controller import TrainController as RayTrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle, PlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupContext
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.util.placement_group import PlacementGroup, placement_group

from llm.job import Job

# Environment of the controller and what it starts. Ray Data asks the autoscaler for more nodes whenever its tasks keep the present ones
# busy, and for a CPU for each of its stages. These thresholds are never reached: it makes do with what the run asks for.
CONTROLLER_SETTINGS = {
    **{f"RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_{kind}_UTIL_THRESHOLD": "1e9" for kind in ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY")},
    RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0",  # as Ray's own start of its controller
}


class TensorGroups(WorkerGroup):
    def _create_placement_group(self, scaling_config: ScalingConfig, worker_group_context: WorkerGroupContext) -> PlacementGroupHandle:
        size, labels = self._tensor, worker_group_context.label_selector
        group = placement_group(
            [group_bundle(worker_group_context.resources_per_worker, size)] * (worker_group_context.num_workers // size),
            strategy=worker_group_context.placement_strategy,
            bundle_label_selector=labels[::size] if labels else None,  # pyright: ignore[reportArgumentType]
        )
        return DefaultPlacementGroupHandle(group)

    def _create_workers(
        self, num_workers: int, placement_group: PlacementGroup, resources_per_worker: dict[str, float], **others: Any
    ) -> list[Worker]:
        """Adjacent ranks share a bundle: Ray numbers workers node by node, and every node has whole groups."""
        assert others.get("placement_group_bundle_indices") is None, "Ray places single workers only where it replaces replicas"
        others["placement_group_bundle_indices"] = [worker // self._tensor for worker in range(num_workers)]
        return super()._create_workers(num_workers, placement_group, resources_per_worker, **others)

    @property
    def _tensor(self) -> int:
        assert self._train_run_context.train_loop_config is not None
        job: Job = self._train_run_context.train_loop_config["job"]
        return job.config.parallel.tensor


class TrainController(RayTrainController):
    worker_group_cls = TensorGroups


class GroupScalingPolicy(FixedScalingPolicy):
    """Tells Ray's autoscaler, and Ray Data, which leaves their places alone, of whole tensor groups."""

    def __init__(self, job: Job, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self.tensor = job.config.parallel.tensor
        self._groups = ScalingConfig(
            num_workers=job.config.parallel.workers // self.tensor,
            use_gpu=scaling_config.use_gpu,
            resources_per_worker=group_bundle(self.per_worker(), self.tensor),
        )

    def per_worker(self) -> dict[str, float]:
        found: Any = self.scaling_config._resources_per_worker_not_none  # wrongly annotated in Ray
        return dict(found)

    def _maybe_send_resource_request(self) -> None:
        assert self._coordinator_client is not None
        self._coordinator_client.maybe_send_resource_request(self._groups, self._groups.max_workers)

    def _send_resource_request(self) -> None:
        assert self._coordinator_client is not None
        self._coordinator_client.send_resource_request(self._groups, self._groups.max_workers)


def group_bundle(per_worker: dict[str, float], tensor: int) -> dict[str, float]:
    return {name: amount * tensor for name, amount in per_worker.items()}
