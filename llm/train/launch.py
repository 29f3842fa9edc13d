"""The driver's side: one Ray Train run of `work` on every worker, fed by the stream, watched through the run's metrics file.

Plain `DataParallelTrainer` with a rendezvous of our own instead of `TorchTrainer`: that one imports torch in the driver and in Ray's
controller, 3 s of CPU time each, and sets up a process group before the worker has looked at its data.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.data
from ray.exceptions import RayTaskError
from ray.train import Result, RunConfig, ScalingConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.util import ObjectRefWrapper
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from llm.data.cache import token_cache
from llm.data.split import OneSplitPerDataRank
from llm.data.stream import Quarantine, sequences
from llm.data.window import Recipe
from llm.errors import HeadraceError, TrainingError
from llm.job import Job
from llm.storage import join
from llm.train import life, recovery
from llm.train.controllers import DEATHS, Controllers
from llm.train.elastic import with_workers
from llm.train.gangs import CONTROLLER_SETTINGS, TrainController
from llm.train.life import Incident
from llm.train.recovery import NODE_ID_LABEL
from llm.train.worker import DATASET, start_file, work
from llm.watched import watched


class _Rendezvous(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(life.begin, address, port, recovery.incident())


class RendezvousConfig(BackendConfig):
    """Tells every worker where rank 0 is, and why the group before it ended; the worker itself makes the process group."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Rendezvous


# How often Ray's controller asks the workers how they are: what a restart waits for before anything happens. 2 s by default.
HEALTH_CHECK_S = 0.5

# How long an elastic group waits for its places before it looks again which nodes there are. 60 s by default.
ELASTIC_START_TIMEOUT_S = 20

# Read by glibc when a process starts; other C libraries do not know these names. It shall keep what is freed, up to 2 GiB, instead of
# giving it back to the system after every tensor, and in one arena: the others are given back when they are empty, and Ray Train's function
# runs in a thread that would have one. On the CPU each microbatch would pay for page faults again (seen: 15 to 20% of a step on 2 cores).
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    # No tensor in a mapping of its own, which is new pages each time. A threshold for mappings can be 32 MiB at most: logits of 50 MB then
    # made a step 13% slower, and its time differed by 15% from one process to the next.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
}


NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}  # a CPU worker may be on a node that has some


@dataclass(frozen=True)
class WorkerResources:
    cpus: float
    gpus: float


class _Trainer(DataParallelTrainer):
    """With policies of our own in Ray's controller. `before`: why the controller before it ended, None for the first."""

    def __init__(self, job: Job, recipe: Recipe, before: Incident | None, **options: Any) -> None:
        super().__init__(work, train_loop_config={"job": job}, **options)
        self._job, self._recipe, self._before = job, recipe, before

    def fit(self) -> Result:
        os.environ.setdefault(HEALTH_CHECK_INTERVAL_S_ENV_VAR, str(HEALTH_CHECK_S))
        elastic = self._job.config.parallel.min_workers is not None
        if elastic:
            os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, str(ELASTIC_START_TIMEOUT_S))
        result = self._initialize_and_run_controller(
            train_fn_ref=ObjectRefWrapper(self._get_train_func()),
            scaling_policy=recovery.ElasticGroupsPolicy(self._job, self.scaling_config)
            if elastic
            else recovery.FixedGroupsPolicy(self._job, self.scaling_config),
            failure_policy=recovery.Restarts(self._job),
            train_run_context=self.train_run_context,
            callbacks=self._create_default_callbacks(),
        )
        if result.error:
            raise result.error
        return result

    def _initialize_and_run_controller(self, **options: Any) -> Result:
        """With a controller of our own, on the driver's node as Ray's. Ray's version also takes over SIGINT, to abort the run from within
        this thread: here the job does (jobs/exit_code.py)."""
        controller = ray.remote(TrainController).options(
            num_cpus=0,
            label_selector={NODE_ID_LABEL: ray.get_runtime_context().get_node_id()},
            runtime_env={"env_vars": CONTROLLER_SETTINGS | get_env_vars_to_propagate()},
        )
        actor: Any = controller.remote(**options)
        ray.get(actor.run.remote())
        return ray.get(actor.get_result.remote())

    def _create_default_callbacks(self) -> list[Any]:
        """Without Ray's PlacementGroupCleaner: the driver cleans up after a dead controller (llm/train/controllers.py), and Ray after a
        dead driver. The cleaner is an actor that costs 4 s of CPU time at start-up and outlives a run that was interrupted."""
        found = super()._create_default_callbacks()
        streams = _Streams(self.train_run_context, partial(_open_stream, self._job, self._recipe))
        found = [streams if isinstance(callback, DatasetsCallback) else callback for callback in found]
        found.append(recovery.Beginning(self._before))
        return [c for c in found if not isinstance(c, PlacementGroupCleanerCallback)]


class _Streams(DatasetsCallback):
    """A stream for as many data ranks as the worker group that starts has."""

    def __init__(self, context: TrainRunContext, open_stream: Callable[[int], ray.data.Dataset]) -> None:
        super().__init__(context, {})
        self._open_stream = open_stream

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        self._datasets = {DATASET: partial(self._open_stream, len(workers))}  # pyright: ignore[reportAttributeAccessIssue]
        return super().before_init_train_context(workers)


def fit(
    job: Job,
    recipe: Recipe,
    resources: WorkerResources,
    ray_folder: str,
    watch: Callable[[], None],
) -> None:
    """Runs the job to its end; `watch` is called every half second meanwhile, and once after.

    Raises the worker's own HeadraceError where there is one, else TrainingError with the first lines of what Ray knows.
    """
    new_trainer = partial(
        _Trainer,
        job,
        recipe,
        backend_config=RendezvousConfig(),
        scaling_config=ScalingConfig(
            num_workers=job.config.parallel.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
        ),
        run_config=RunConfig(
            name=job.config.run.name,
            storage_path=ray_folder,
            worker_runtime_env={
                "worker_process_setup_hook": "llm.train.preload.begin",
                "env_vars": {} if resources.gpus else KEEP_FREED_MEMORY | NO_GPUS,
            },
        ),
        dataset_config=OneSplitPerDataRank(job.config.parallel.tensor),
    )

    def train() -> None:
        try:
            _fit_through_controllers(new_trainer, Controllers(job))
        except BaseException as error:
            raise user_error(error) from None

    watched(train, watch, "ray-train")


def _fit_through_controllers(new_trainer: Callable[[Incident | None], _Trainer], controllers: Controllers) -> None:
    """Fits a trainer; another where the first one's controller died, and so on."""
    before: Incident | None = None
    while True:
        try:
            new_trainer(before).fit()
            return
        except DEATHS as death:  # of the controller: what happens to its workers it tells in errors of its own
            error = death.with_traceback(None)  # whose frames hold the dead actor's handle
        before = controllers.after(error)


def _open_stream(job: Job, recipe: Recipe, workers: int) -> ray.data.Dataset:
    """Called when a worker group starts. Where it begins is the workers' to say: they read the newest checkpoint."""
    config = with_workers(job.config, workers)
    return sequences(
        recipe,
        start_file(job),
        num_rows=config.train.rows_before(config.train.steps),
        batch_sizes=config.train.batch_sizes,
        data_size=config.parallel.data_size,
        windows_ahead=config.data.windows_ahead,
        quarantine=Quarantine(join(job.run_uri, "quarantine"), config.s3),
        cache=token_cache(config),
    )


def user_error(error: BaseException) -> HeadraceError:
    """The error to show: the first of ours among the causes, else one line of what went wrong."""
    seen: list[BaseException] = []
    queue = [error]
    while queue:
        current = queue.pop(0)
        if any(current is other for other in seen):
            continue
        seen.append(current)
        # What Ray makes of an error in a task is of the error's own class too, with a traceback for a text.
        if isinstance(current, HeadraceError) and not isinstance(current, RayTaskError):
            return current
        queue += list(getattr(current, "worker_failures", {}).values())
        inner = (getattr(current, name, None) for name in ("_base_exc", "cause", "controller_failure", "__cause__"))
        queue += [cause for cause in inner if isinstance(cause, BaseException)]
    deepest = seen[-1]
    lines = [line for line in str(deepest).splitlines() if line.strip()] or [""]
    return TrainingError(f"training failed: {type(deepest).__name__}: {lines[-1].strip()[:500]}")
