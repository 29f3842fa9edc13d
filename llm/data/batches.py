"""Blocks of rows -> this rank's part of each batch, fetched ahead of the step that needs it.

Tensor rank 0 of each data rank reads one block a step and broadcasts it to its tensor peers, which never touch the pipeline. The ranks
then agree on what a batch is as a whole: how many tokens it predicts (the loss is divided by it), and the cursor after it. Both run in a
thread, on process groups of their own, one step ahead of training.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llm.data.order import Cursor
from llm.errors import DataError, TrainingError
from llm.parallel.mesh import Mesh

BATCHES_AHEAD = 2
MIN_RECORDS_JUDGED = 1000  # data.max_bad_frac is a fraction of at least this many records, so that one early bad record ends no run

Block = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """One data rank's part of one step's batch; the scalars are about the whole batch."""

    ids: Tensor  # int32 (rank_rows, seq_len + 1), on the CPU
    segments: Tensor  # int32, same shape; 0 is padding
    predicted_tokens: int
    cursor: Cursor  # the sequence after the batch's last


class DataGroups:
    """Gloo process groups used only by the fetching thread: collectives of two threads on one group would mix. All ranks must make it."""

    def __init__(self, mesh: Mesh) -> None:
        self.world = dist.new_group(backend="gloo")
        self.tensor: Any = None
        self.first_rank = mesh.tensor_group[0]
        if mesh.tensor_size > 1:
            for first in range(0, mesh.world_size, mesh.tensor_size):
                group = dist.new_group(list(range(first, first + mesh.tensor_size)), backend="gloo")
                if first == self.first_rank:
                    self.tensor = group


class BatchFetcher:
    """Iterates exactly `num_batches` batches, fetched by a thread that starts at once, while the caller builds its model.

    `blocks` gives `rank_rows` rows each, on tensor rank 0 only (None on its peers). Iterating raises DataError where the corpus ends too
    early or too many records are bad, on every rank, so that none waits for another.
    """

    def __init__(
        self,
        blocks: Iterable[Block] | None,
        mesh: Mesh,
        groups: DataGroups,
        *,
        num_batches: int,
        rank_rows: int,
        seq_len: int,
        isolate: bool,
        max_bad_frac: float,
    ) -> None:
        self._source = iter(blocks) if blocks is not None else None
        self._mesh = mesh
        self._num_batches = num_batches
        self._shape = (2, rank_rows, seq_len + 1)
        self._isolate = isolate
        self._max_bad_frac = max_bad_frac
        self._tally = np.zeros(2, dtype=np.int64)  # records, bad ones
        self._fetched: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=BATCHES_AHEAD)
        self._stopped = threading.Event()
        self._groups = groups
        self._thread = threading.Thread(target=self._fetch, name="fetch-batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._num_batches):
            item = self._fetched.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Ends the thread at its next block."""
        self._stopped.set()

    def _fetch(self) -> None:
        try:
            for _ in range(self._num_batches):
                block = None if self._source is None else next(self._source, None)
                if self._stopped.is_set():
                    return
                self._put(self._agreed(block))
        except BaseException as error:  # given to the training thread, which raises it
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._fetched.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _agreed(self, block: Block | None) -> Batch:
        """The batch that this rank's block is a part of, once all ranks have told what they hold."""
        mesh, groups = self._mesh, self._groups
        rows = torch.zeros(self._shape, dtype=torch.int32)
        facts = torch.zeros(7, dtype=torch.int64)  # has a block, predicted tokens, epoch, window, next offset, records, bad ones
        if block is not None and len(block["ids"]) == self._shape[1]:
            rows[0] = torch.from_numpy(np.array(block["ids"], dtype=np.int32))
            rows[1] = torch.from_numpy(np.array(block["segments"], dtype=np.int32))
            epoch, window, offset = (int(x) for x in block["position"][-1])
            read, bad = int(block["records"].sum()), int(block["bad"].sum())
            facts = torch.tensor([1, count_predicted(rows[1], self._isolate), epoch, window, offset + 1, read, bad])
        if groups.tensor is not None:
            dist.broadcast(rows, src=groups.first_rank, group=groups.tensor)
        gathered = [torch.empty_like(facts) for _ in range(mesh.world_size)]
        dist.all_gather(gathered, facts, group=groups.world)
        readers = torch.stack(gathered[:: mesh.tensor_size])
        self._check(readers)
        cursor = Cursor(int(readers[-1, 2]), int(readers[-1, 3]), int(readers[-1, 4]))
        predicted = int(readers[:, 1].sum())
        if predicted == 0:
            raise TrainingError(f"the batch before {cursor} has no token to predict: all its documents are one token long.")
        return Batch(rows[0], rows[1], predicted, cursor)

    def _check(self, readers: Tensor) -> None:
        if not bool(readers[:, 0].all()):
            raise DataError(
                "the corpus gave fewer rows than the run needs: its files hold almost no text after cleaning. "
                "Check data.sources and data.clean.min_chars."
            )
        self._tally += readers[:, 5:].sum(dim=0).numpy()
        records, bad = (int(n) for n in self._tally)
        if bad > self._max_bad_frac * max(records, MIN_RECORDS_JUDGED):
            raise DataError(
                f"{bad} of {records} records are unreadable, more than data.max_bad_frac={self._max_bad_frac} allows (of at least "
                f"{MIN_RECORDS_JUDGED} records). quarantine/ in the run's folder lists them: mend them, or raise data.max_bad_frac."
            )


def count_predicted(segments: Tensor, isolate: bool) -> int:
    """Tokens that the loss is over: all but padding and each row's first; with `isolate` also without each document's first."""
    label, before = segments[:, 1:], segments[:, :-1]
    valid = label != 0
    if isolate:
        valid &= label == before
    return int(valid.sum())
