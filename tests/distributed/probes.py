"""Probes in plain gloo processes, without Ray: what `llm/train/tune/collect.py` listens to."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm.job import Job
from llm.parallel.mesh import Mesh
from llm.train.tune.events import Event, ProbeTask, RankDiedError
from tests.distributed.layouts import CONTEXT
from tests.ports import free_port

# M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD, which a worker gets by its environment (llm.train.launch.KEEP_FREED_MEMORY).
MALLOPT = {-8: 1, -4: 0, -1: (1 << 31) - 1}


class LocalProbes:
    """Starts probes of one job; counts the groups of processes."""

    def __init__(self, job: Job, rank_main: Any = None) -> None:
        self._job, self._main = job, rank_main or probe_main
        self.tasks: list[ProbeTask] = []

    @contextlib.contextmanager
    def __call__(self, task: ProbeTask) -> Iterator[Sequence[Iterator[Event]]]:
        self.tasks.append(task)
        workers, tensor = self._job.config.parallel.workers, self._job.config.parallel.tensor
        task, port = replace(task, local_size=workers), free_port()
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(workers)]
        with tempfile.TemporaryDirectory() as scratch:
            processes = [
                CONTEXT.Process(target=self._main, args=(pipes[rank][1], self._job, Mesh(rank, workers, tensor), task, port, scratch))
                for rank in range(workers)
            ]
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()
            try:
                yield [_events(receiver, process) for (receiver, _), process in zip(pipes, processes, strict=True)]
            finally:
                for process in processes:
                    process.kill()
                    process.join()


def probe_main(sender: Any, job: Job, mesh: Mesh, task: ProbeTask, port: int, scratch: str) -> None:
    quiet = os.open(Path(scratch) / f"rank-{mesh.rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    from llm.train.tune.probe import begin_process, probe

    libc = ctypes.CDLL(None)
    for option, value in MALLOPT.items():
        libc.mallopt(option, value)
    try:
        begin_process(mesh, "127.0.0.1", port, mesh.rank, task.local_size)
        for event in probe(job, mesh, task):
            sender.send(event)
        sender.send(None)
    except BaseException as error:
        sender.send(error if isinstance(error, Exception) else RuntimeError(repr(error)))
    finally:
        sender.close()
        os._exit(0)


def _events(receiver: Any, process: Any) -> Iterator[Event]:
    while True:
        try:
            event = receiver.recv()
        except (EOFError, OSError):
            process.join(5)
            raise RankDiedError(f"its process died (exit code {process.exitcode})") from None
        if event is None:
            return
        if isinstance(event, BaseException):
            raise event
        yield event
