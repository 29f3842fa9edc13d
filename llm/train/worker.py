"""What one Ray Train worker does: find its place, open its part of the stream, train.

Importing this module brings in no torch: the driver and Ray's controller import it to name `work`, and torch, DeepSpeed and transformers
cost a process 6 s of CPU time.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import ray
import ray.train

from llm.checkpoint.start import first_state
from llm.checkpoint.store import CheckpointStore
from llm.data.order import Cursor
from llm.data.start_file import StartFile
from llm.errors import HangError, TrainingError
from llm.job import Job
from llm.observe.quiet import quiet_worker
from llm.parallel.mesh import Mesh
from llm.redact import scrubbed
from llm.state import TrainState
from llm.storage import is_s3, join, local_path
from llm.train import life
from llm.train.elastic import with_workers
from llm.train.watchdog import Watchdog, exit_at_once

DATASET = "train"
HANG_EXIT_AFTER_S = 15.0  # what a hang is told, until the controller has ended the group
Block = Mapping[str, Any]


def start_file(job: Job) -> StartFile:
    return StartFile(join(job.run_uri, "logs", "stream-start.json"), job.config.s3)


def work(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker. `config`: {"job": Job}."""
    with scrubbed():
        _work(config["job"])


def _work(job: Job) -> None:
    incident = life.incident()
    if incident is None:
        phases = {"from the command to the worker": time.time() - job.started_at_s}
    else:
        phases = {"from the failure to the worker": time.time() - incident.at_s}
    context = ray.train.get_context()
    job = replace(job, config=with_workers(job.config, context.get_world_size()))  # fewer than the run wants, where nodes are missing
    mesh = Mesh(context.get_world_rank(), context.get_world_size(), job.config.parallel.tensor)
    with quiet_worker(_log_file(job, mesh.rank)):
        shard = ray.train.get_dataset_shard(DATASET)  # a barrier: every rank calls it, tensor peers get None
        start = first_state(CheckpointStore(job.run_uri, job.config.s3), job.config)
        reader = None
        if shard is not None:
            reader = ShardReader(shard, job, mesh.data_rank)
            reader.prefetch(job.schedule.at_step(start.cursor, start.step))
        _train(job, mesh, reader, start, context, phases)


def _train(job: Job, mesh: Mesh, reader: ShardReader | None, start: TrainState, context: Any, phases: dict[str, float]) -> None:
    began_s = time.perf_counter()
    import torch
    import torch.distributed as dist

    from llm.train.loop import train
    from llm.train.tune.noise_run import measure_noise

    phases["importing torch, DeepSpeed and transformers"] = time.perf_counter() - began_s
    local_rank, local_size = context.get_local_rank(), context.get_local_world_size()
    os.environ |= {"RANK": str(mesh.rank), "WORLD_SIZE": str(mesh.world_size), "LOCAL_RANK": str(local_rank)}
    # Logical CPUs follow the plan, threads follow the cores: 4 workers on 2 cores run one thread each.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    watchdog = _watchdog(job, mesh)
    try:
        nodes = _nodes_of_ranks(mesh)
        watchdog.start(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if job.noise_steps:
            measure_noise(job, mesh, reader, start, watchdog)
        else:
            train(job, mesh, reader, start, phases, nodes=nodes, incident=life.incident(), wish=life.wish, watchdog=watchdog)
    finally:
        watchdog.close()
        dist.destroy_process_group()


def _watchdog(job: Job, mesh: Mesh) -> Watchdog:
    limits = job.config.recovery
    return Watchdog(
        mesh.rank,
        mesh.world_size,
        _log_file(job, mesh.rank).parent,
        hang_s=limits.hang_s,
        long_phase_s=limits.long_phase_s,
        on_hang=_fail_as_hanging,
    )


def _fail_as_hanging(error: HangError) -> None:
    """Called by the watchdog: the training thread is stuck, so the controller is told in its place, and ends the process; where it cannot,
    the process ends itself."""
    from ray.train.v2._internal.execution.context import get_train_context
    from ray.train.v2._internal.util import construct_user_exception_with_traceback

    runner = get_train_context().execution_context.training_thread_runner
    runner.get_exception_queue().put(construct_user_exception_with_traceback(error))
    time.sleep(HANG_EXIT_AFTER_S)
    exit_at_once(error)


def _nodes_of_ranks(mesh: Mesh) -> list[int]:
    """Each rank's node, numbered from 0 in the order of ranks. Raises TrainingError where this rank's tensor group lies on several."""
    import torch
    import torch.distributed as dist

    told = [torch.zeros(1, dtype=torch.int64) for _ in range(mesh.world_size)]
    dist.all_gather(told, torch.tensor([int(ray.get_runtime_context().get_node_id()[-15:], 16)]))  # what an int64 holds of it
    numbers: dict[int, int] = {}
    nodes = [numbers.setdefault(int(node), len(numbers)) for node in told]
    if len({nodes[rank] for rank in mesh.tensor_group}) > 1:
        raise TrainingError(
            f"the tensor group of ranks {list(mesh.tensor_group)} lies on several nodes; its matrices talk to each other in every layer. "
            f"Use nodes whose number of GPUs is a multiple of parallel.tensor={mesh.tensor_size}."
        )
    return nodes


class ShardReader:
    """This data rank's split of the dataset. Every pass executes the dataset anew, from where the run's `StartFile` says."""

    def __init__(self, shard: Any, job: Job, data_rank: int) -> None:
        self._shard, self._job, self._data_rank = shard, job, data_rank
        self._first: tuple[Cursor, Future[Block | None], Generator[Block]] | None = None

    def prefetch(self, cursor: Cursor) -> None:
        """Fetches the first block in a thread from now on, while the caller imports torch and builds the model."""
        blocks, first = self._pass(cursor), Future[Any]()

        def fetch() -> None:
            try:
                first.set_result(next(blocks, None))
            except BaseException as error:
                first.set_exception(error)

        Thread(target=fetch, name="first-block", daemon=True).start()
        self._first = cursor, first, blocks

    def begin(self, cursor: Cursor) -> Iterator[Block]:
        prefetched, self._first = self._first, None
        if prefetched is None:
            yield from self._pass(cursor)
            return
        at, first, blocks = prefetched
        block = first.result()
        if at != cursor:  # the newest checkpoint was damaged, and training goes on from one before it
            blocks.close()
            yield from self._pass(cursor)
            return
        if block is not None:
            yield block
            yield from blocks

    def _pass(self, cursor: Cursor) -> Generator[Block]:
        # No execution begins before every data rank has asked for one, so all of its tasks find what is written here.
        if self._data_rank == 0:
            start_file(self._job).write(cursor)
        yield from self._shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)


def _log_file(job: Job, rank: int) -> Path:
    """Where this worker's third-party chatter goes: beside the run, or on the node where the run is on S3."""
    folder = tempfile.gettempdir() if is_s3(job.run_uri) else local_path(join(job.run_uri, "logs"))
    return Path(folder) / f"worker-{rank:05d}.log"
