"""The Ray pipeline as a run has it, with two readers and a private cluster, and the CPU seconds of all of its processes, by role."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from cluster.connect import connected
from cluster.workers import total_cpus
from llm.config import S3Section
from llm.data.cache import TokenCache
from llm.data.order import Cursor
from llm.data.window import Recipe

READERS = 2
# Of the batches: read before the clock starts, so that what processes do once (imports, building a tokenizer) is left out, and left unread
# when it stops, so that as much lies ready then as at the start.
WARM_FRAC, UNREAD_FRAC = 0.2, 0.2
SAMPLE_S = 1.0
ROLES = {"ray::Reader": "readers", "ray::SplitCoordinator": "coordinator", "ray::": "tasks", "raylet": "raylet", "gcs_server": "gcs"}


class Reader:
    """A data rank: what `llm/train/worker.py` and `llm/data/batches.py` do to a block until it is tensors."""

    def __init__(self, shard: Any, rank_rows: int) -> None:
        from llm.data.batches import RowsInTurn

        self._rows, self._rank_rows = RowsInTurn(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)), rank_rows

    def read(self, num_batches: int) -> int:
        """Takes the next batches; the number of ids in them."""
        import numpy as np
        import torch

        ids = 0
        for _ in range(num_batches):
            block = self._rows.take(self._rank_rows)
            assert block is not None, "the stream ended early"
            rows = [torch.from_numpy(np.array(block[name], dtype=np.int32)) for name in ("ids", "segments")]
            ids += rows[0].numel()
        return ids


class TreeCpu:
    """CPU seconds of this process and all below it, by role. Sampled, so that those that end in between count too."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, float], tuple[str, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def by_role(self) -> Counter[str]:
        self._sample()
        found: Counter[str] = Counter()
        for role, seconds in list(self._seconds.values()):
            found[role] += seconds  # pyright: ignore[reportArgumentType]
        return found

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                times, line = process.cpu_times(), " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            role = "driver" if process.pid == me.pid else next((role for begin, role in ROLES.items() if begin in line), "other")
            self._seconds[process.pid, process.create_time()] = role, times.user + times.system


def run_stream(
    recipe: Recipe, cache: TokenCache | None, batch_rows: int, num_batches: int, windows_ahead: int, sender: Any, profile: str = ""
) -> None:
    """Sends (ids read, CPU seconds by role, wall seconds) of the batches between the first WARM_FRAC and the last UNREAD_FRAC."""
    with tempfile.TemporaryDirectory() as folder, connected(total_cpus(READERS, windows_ahead)):
        import ray

        from llm.data.split import OneSplitPerDataRank
        from llm.data.start_file import StartFile
        from llm.data.stream import Quarantine, sequences

        start = StartFile(str(Path(folder) / "start.json"), S3Section())
        start.write(Cursor())
        dataset = sequences(
            recipe,
            start,
            num_rows=num_batches * batch_rows,
            batch_sizes=[batch_rows],
            data_size=READERS,
            windows_ahead=windows_ahead,
            quarantine=Quarantine(folder, S3Section()),
            cache=cache,
        )
        shards = OneSplitPerDataRank(1).configure({"train": dataset}, READERS, None, None)
        actor: Any = ray.remote(num_cpus=1)(Reader)
        readers = [actor.remote(shard["train"], batch_rows // READERS) for shard in shards]
        warm, measured = int(num_batches * WARM_FRAC), int(num_batches * (1 - WARM_FRAC - UNREAD_FRAC))
        ray.get([reader.read.remote(warm) for reader in readers])
        cpu = TreeCpu()
        before, began = cpu.by_role(), time.perf_counter()
        ids = sum(ray.get([reader.read.remote(measured) for reader in readers]))
        spent, took = cpu.by_role(), time.perf_counter() - began
        cpu.close()
        spent.subtract(before)
        sender.send((ids, dict(spent), took))


def roles_told(seconds: dict[str, float]) -> Iterator[str]:
    total = sum(seconds.values())
    for role, each in sorted(seconds.items(), key=lambda item: -item[1]):
        yield f"{role} {each / total:.0%}"
