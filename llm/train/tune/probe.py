"""What one process of a probe does: the run's own engine on its layout, made-up tokens, real steps; peak memory and times come out.

Knows no Ray: `llm/train/tune/ray_probes.py` runs it in actors, a test in processes of its own. `probe` is a generator, so that what a
process has told stays known when the next size kills it.

On a GPU a step's peak is what the allocator has reserved at most, and what lies outside of it (context, NCCL). On a CPU the limit is made
real with RLIMIT_DATA, so that an allocation which is too large fails there as it does on a GPU; the peak is the kernel's own record,
VmPeak, less what is no data. Both leave out address space that the process had reserved and not touched when the limit was set, thread
stacks above all, so a limit of 4 GiB means 4 GiB of real private memory.

Not in it, because no step takes it: on a CPU, the copy of weights and moments that a checkpoint writes from, and the pages of files.
"""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from llm.data.batches import Batch, count_predicted
from llm.job import Job
from llm.parallel.mesh import Mesh
from llm.parallel.zero import Engine
from llm.state import TrainState
from llm.train.build import build_engine
from llm.train.guard import Judge
from llm.train.step import train_step
from llm.train.tune.events import Event, Fits, Limit, OutOfMemory, ProbeTask, Timed, Trying
from llm.train.tune.memory_model import worth_trying

CPU_FRAC = 0.9  # of the memory that is free, where no limit is given
STEPS_A_SIZE = 6  # the first makes the optimizer's moments; on a CPU the heap goes on growing by some 10% over the next ones
ROUNDS = 25  # of timing, size by size in turn: a neighbour's work on the machine meets all sizes alike
MOST_TIMED = 16  # microbatches of a timed step: of a step of more, the rest is told by the model
TIMING_S = 40.0  # after which no further round begins, once there are MIN_ROUNDS
MIN_ROUNDS = 3
DOCUMENTS_A_ROW = 4  # with data.isolate_documents, whose mask takes memory
NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "alloc_failed", "can't start new thread")


def probe(job: Job, mesh: Mesh, task: ProbeTask) -> Iterator[Event]:
    """Runs the sizes of `task.climb` in turn, then times those of `task.time` that are known to fit. All ranks must run it to its end.

    Ends with OutOfMemory where a size takes more than there is; whatever else goes wrong is raised. torch.distributed must be initialized.
    """
    memory = _GpuMemory() if torch.cuda.is_available() else _CpuMemory()
    limit_bytes = _agreed(task.limit_bytes or memory.available(task.local_size), dist.ReduceOp.MIN)
    yield Limit(limit_bytes)
    if (used_bytes := _agreed(memory.used(), dist.ReduceOp.MAX)) >= limit_bytes:
        yield OutOfMemory(0, f"a worker's process takes {used_bytes / 2**30:.2f} GiB before it has a model")
        return
    memory.set_limit(limit_bytes)
    rows, peaks = 0, dict[int, int]()
    try:
        engine = build_engine(job, mesh)
        for rows in task.climb:
            if not worth_trying(peaks, rows, limit_bytes):
                break
            yield Trying(rows)
            memory.begin()
            accumulation = min(2, job.config.rank_rows // rows)
            for _ in range(STEPS_A_SIZE):
                _step(job, engine, rows, accumulation)
            # What has run was within the limit, which is enforced; the record also has a little that was mapped and given back.
            peaks[rows] = min(limit_bytes, _agreed(memory.peak(), dist.ReduceOp.MAX))
            yield Fits(rows, peaks[rows])
        sizes = [n for n in task.time if n <= max(peaks)]  # what is smaller takes less
        rows = max(sizes, default=rows)
        if not torch.cuda.is_available():
            memory.lift_limit()  # sizes that fit alone need not fit after one another, and what fits is known by now
        yield from _timed(job, engine, sizes)
    except Exception as error:
        memory.lift_limit()  # or there may be none left to tell it with
        failed = failed_allocation(error)
        if failed is None:
            raise
        yield OutOfMemory(rows, _first_line(failed))


def failed_allocation(error: BaseException | None) -> BaseException | None:
    """The error of an allocation that failed, on a GPU or on the CPU: this one or what caused it. None where none did."""
    while error is not None:
        told = str(error).lower()
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in told for text in NO_MEMORY):
            return error
        error = error.__cause__ or error.__context__
    return None


def _timed(job: Job, engine: Engine, sizes: list[int]) -> Iterator[Event]:
    """Seconds of a step with one microbatch, and with as many as the run has, for each size."""
    cases = [(rows, count) for rows in sizes for count in sorted({1, min(MOST_TIMED, job.config.rank_rows // rows)})]
    times: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for rows, accumulation in cases:
        _step(job, engine, rows, accumulation)
    began_s = time.perf_counter()
    for number in range(1, ROUNDS + 1):
        for rows, accumulation in cases:
            times[rows, accumulation].append(_step(job, engine, rows, accumulation))
        if _agreed(int(number >= MIN_ROUNDS and time.perf_counter() - began_s > TIMING_S), dist.ReduceOp.MAX):
            break
    for (rows, accumulation), step_s in times.items():
        yield Timed(rows, accumulation, tuple(step_s))


def _step(job: Job, engine: Engine, rows: int, accumulation: int) -> float:
    """One optimizer step on made-up tokens, with a learning rate of 0; the seconds that it took."""
    config = job.config
    batch = _made_up(job, engine.mesh, rows * accumulation)
    began_s = time.perf_counter()
    fine = Judge(lambda loss: None, lambda norm: None)
    train_step(engine, batch, fine, microbatch_rows=rows, isolate=config.data.isolate_documents, lr_factor=0.0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


def _made_up(job: Job, mesh: Mesh, num_rows: int) -> Batch:
    """Random ids, all of which the model predicts: tensor peers get the same."""
    width = job.config.data.seq_len + 1
    ids = np.random.default_rng(mesh.data_rank).integers(0, job.tokenizer.vocab_size, (num_rows, width), dtype=np.int32)
    segments = torch.ones((num_rows, width), dtype=torch.int32)
    isolate = job.config.data.isolate_documents
    if isolate:
        segments += (torch.arange(width, dtype=torch.int32) * DOCUMENTS_A_ROW // width)[None]
    predicted = count_predicted(segments, isolate) * mesh.data_size
    start = TrainState()
    return Batch(torch.from_numpy(ids), segments, predicted, start.cursor, np.zeros((0, 0), dtype=np.uint8), Counter())


def _agreed(value: int, how: dist.ReduceOp.RedOpType) -> int:
    """The greatest or smallest of what the ranks say."""
    told = torch.tensor([value], dtype=torch.int64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(told, op=how)
    return int(told)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


class _CpuMemory:
    """Private memory of this process, in bytes."""

    def __init__(self) -> None:
        found = _status()
        self._untouched = max(0, found["VmData"] - found["RssAnon"])
        self._before = resource.getrlimit(resource.RLIMIT_DATA)

    def available(self, local_size: int) -> int:
        """This process's share of what is free on the node, or in its cgroup, besides what it has already."""
        return int(CPU_FRAC * available_bytes() / local_size) + _status()["RssAnon"]

    def used(self) -> int:
        return _status()["RssAnon"]

    def set_limit(self, limit_bytes: int) -> None:
        hard = self._before[1]
        soft = limit_bytes + self._untouched
        resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))

    def lift_limit(self) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self._before)

    def begin(self) -> None:
        """Nothing: the kernel's record never falls, and neither does what a run needs."""

    def peak(self) -> int:
        found = _status()
        return found["VmData"] + found["VmPeak"] - found["VmSize"] - self._untouched


class _GpuMemory:
    """Memory of this process's device, in bytes; other processes' is in it, for it is not there for the run."""

    def available(self, local_size: int) -> int:
        return torch.cuda.mem_get_info()[1]

    def used(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    def set_limit(self, limit_bytes: int) -> None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / torch.cuda.mem_get_info()[1]))

    def lift_limit(self) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0)

    def begin(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.max_memory_reserved() + total - free - torch.cuda.memory_reserved()


def available_bytes() -> int:
    """Memory that can still be had on this node, or in this process's cgroup where that allows less."""
    found = [psutil.virtual_memory().available]
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        folder = Path("/sys/fs/cgroup")
        try:
            found.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return max(0, min(found))


def _status() -> dict[str, int]:
    """The sizes of /proc/self/status, in bytes."""
    lines = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) << 10 for name, value in lines if value.strip().endswith(" kB")}


def begin_process(mesh: Mesh, address: str, port: int, local_rank: int, local_size: int) -> None:
    """Makes this process one rank of a group: environment, threads and device as a training worker has them."""
    os.environ |= {"RANK": str(mesh.rank), "WORLD_SIZE": str(mesh.world_size), "LOCAL_RANK": str(local_rank)}
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
