"""Blocks of rows -> this rank's part of each batch, fetched ahead of the step that needs it.

Tensor rank 0 of each data rank reads blocks of many rows and broadcasts each step's to its tensor peers, which never touch the pipeline.
The ranks then agree on what a batch is as a whole: how many tokens it predicts (the loss is divided by it), the digests of its rows (the
ledger is made of them), and the cursor after it. Both run in a thread, on process groups of their own, one step ahead of
training.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llm.data.ledger import DIGEST_BYTES, row_digests
from llm.data.order import Cursor, Schedule
from llm.errors import DataError, TrainingError
from llm.parallel.mesh import Mesh
from llm.state import COUNTED, TrainState

BATCHES_AHEAD = 2
MIN_RECORDS_JUDGED = 1000  # data.max_bad_frac is a fraction of at least this many records, so that one early bad record ends no run

FIXED_FACTS = 7  # numbers at the front of what a rank tells of its block

Block = Mapping[str, np.ndarray]


class Reader(Protocol):
    """A data rank's access to the stream. Every data rank must begin at the same cursor."""

    def begin(self, cursor: Cursor) -> Iterator[Block]:
        """The data rank's blocks from the cursor on, for one pass; a call ends the pass before. A block is this rank's rows of one or more
        units, unit by unit: a multiple of `unit_rows`."""
        ...


@dataclass(frozen=True)
class Batch:
    """One data rank's part of one step's batch; all but the rows is about the whole batch."""

    ids: Tensor  # int32 (rank_rows, seq_len + 1), on the CPU
    segments: Tensor  # int32, same shape; 0 is padding
    predicted_tokens: int
    cursor: Cursor  # the sequence after the batch's last
    digests: np.ndarray  # uint8 (batch_rows, DIGEST_BYTES), in the batch's order
    counts: Counter[str]  # records of the windows that it begins, see COUNTED
    paces: tuple[int, ...] = ()  # by rank: what its `pace` said
    stop: int = 0  # the greatest of what the ranks' `stop` said when it was fetched: they all stop after the same step


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
    """Iterates exactly `num_batches` batches from `start` on, fetched by a thread that starts at once, while the caller builds its model.

    `rank_rows_at(step)`: this data rank's rows of the batch that begins when `step` are done, a multiple of the `unit_rows` that it is
    dealt at once.

    `reader` is there on tensor rank 0 only (None on its peers). Iterating raises DataError where the corpus holds no text or too many
    records are bad, on every rank, so that none waits for another.

    `stop` is asked for each batch: a number above 0 on any rank makes `Batch.stop` and `stop_asked` so on all, some BATCHES_AHEAD steps
    later. `pace`, a whole number too, comes to all ranks the same way. Neither costs a collective of its own.
    """

    def __init__(
        self,
        reader: Reader | None,
        mesh: Mesh,
        groups: DataGroups,
        *,
        start: TrainState,
        schedule: Schedule,
        num_batches: int,
        rank_rows_at: Callable[[int], int],
        unit_rows: int,
        seq_len: int,
        isolate: bool,
        max_bad_frac: float,
        stop: Callable[[], int] = lambda: 0,
        pace: Callable[[], int] = lambda: 0,
    ) -> None:
        self._reader = reader
        self._mesh = mesh
        self._start = start
        self._schedule = schedule
        self._num_batches = num_batches
        self._rank_rows_at, self._unit_rows = rank_rows_at, unit_rows
        self._width = seq_len + 1
        self._isolate = isolate
        self._max_bad_frac = max_bad_frac
        self._stop, self._pace = stop, pace
        self.stop_asked = 0  # of the batches given so far
        self.paces: tuple[int, ...] = ()  # of the last batch given
        self._counts = Counter(start.counts)
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
            self.stop_asked, self.paces = max(self.stop_asked, item.stop), item.paces
            yield item

    def close(self) -> None:
        """Ends the thread at its next block."""
        self._stopped.set()

    def _fetch(self) -> None:
        try:
            for batch in self._batches():
                self._put(batch)
                if self._stopped.is_set():
                    return
        except BaseException as error:  # given to the training thread, which raises it
            self._put(error)

    def _batches(self) -> Iterator[Batch]:
        """A pass over the stream begins with the run, where a stage begins, and where the pass before has ended."""
        cursor, blocks, fresh = self._start.cursor, None, False
        for step in range(self._start.step, self._start.step + self._num_batches):
            at, rank_rows = self._schedule.at_step(cursor, step), self._rank_rows_at(step)
            if blocks is None or at != cursor:
                blocks, fresh = self._begin(at), True
            while (batch := self._agreed(blocks.take(rank_rows), rank_rows, at)) is None:
                if fresh:
                    raise DataError(
                        "the stream gave no batch: the corpus holds almost no text after cleaning, less than a batch of "
                        f"{rank_rows * self._mesh.data_size} rows in many windows. Check data.sources and data.clean.min_chars."
                    )
                blocks, fresh = self._begin(at), True
            cursor, fresh = batch.cursor, False
            yield batch

    def _begin(self, cursor: Cursor) -> RowsInTurn:
        return RowsInTurn(() if self._reader is None else self._reader.begin(cursor))

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._fetched.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _agreed(self, block: Block | None, rank_rows: int, at: Cursor) -> Batch | None:
        """The batch that this rank's block is a part of, once all ranks have told what they hold; None where the pass is at its end."""
        mesh, groups = self._mesh, self._groups
        shape = (2, rank_rows, self._width)
        rows = torch.zeros(shape, dtype=torch.int32, pin_memory=torch.cuda.is_available())  # copied to a GPU while it computes
        # Whether there is a block, predicted tokens, epoch, window, next offset; the wish to stop, the pace; COUNTED; the rows' digests.
        facts = np.zeros(FIXED_FACTS + len(COUNTED) + rank_rows * DIGEST_BYTES // 8, dtype=np.int64)
        facts[5:FIXED_FACTS] = self._stop(), self._pace()
        if block is not None:
            rows[0] = torch.from_numpy(np.array(block["ids"], dtype=np.int32))
            rows[1] = torch.from_numpy(np.array(block["segments"], dtype=np.int32))
            epoch, window, offset = (int(x) for x in block["position"][-1])
            facts[:5] = 1, count_predicted(rows[1], self._isolate), epoch, window, offset + 1
            facts[FIXED_FACTS : FIXED_FACTS + len(COUNTED)] = block["counts"].sum(axis=0)
            facts[FIXED_FACTS + len(COUNTED) :] = row_digests(rows[0].numpy(), rows[1].numpy()).reshape(-1).view(np.int64)
        if groups.tensor is not None:
            dist.broadcast(rows, src=groups.first_rank, group=groups.tensor)
        gathered = [torch.empty(len(facts), dtype=torch.int64) for _ in range(mesh.world_size)]
        dist.all_gather(gathered, torch.from_numpy(facts), group=groups.world)
        readers = torch.stack(gathered[:: mesh.tensor_size]).numpy()
        if not readers[:, 0].any():
            return None
        if not readers[:, 0].all():
            raise TrainingError(f"data ranks disagree on the stream after {at}: some have a block of {rank_rows} rows, some have none.")
        counts: Counter[str] = Counter(
            dict(zip(COUNTED, readers[:, FIXED_FACTS : FIXED_FACTS + len(COUNTED)].sum(axis=0).tolist(), strict=True))
        )
        self._judge(counts)
        predicted = int(readers[:, 1].sum())
        epoch, window, offset = (int(x) for x in readers[-1, 2:5])
        cursor = Cursor(epoch, window, offset, at.began)
        if predicted == 0:
            raise TrainingError(f"the batch before {cursor} has no token to predict: all its documents are one token long.")
        digests = np.ascontiguousarray(readers[:, FIXED_FACTS + len(COUNTED) :]).view(np.uint8).reshape(mesh.data_size, -1, DIGEST_BYTES)
        digests = in_order(digests, self._unit_rows)
        stop = max(int(facts[5]) for facts in gathered)
        paces = tuple(int(facts[6]) for facts in gathered)
        return Batch(rows[0], rows[1], predicted, cursor, digests, counts, paces, stop)

    def _judge(self, counts: Counter[str]) -> None:
        self._counts.update(counts)
        records, bad = self._counts["records"], self._counts["bad"]
        if bad > self._max_bad_frac * max(records, MIN_RECORDS_JUDGED):
            raise DataError(
                f"{bad} of {records} records are unreadable, more than data.max_bad_frac={self._max_bad_frac} allows (of at least "
                f"{MIN_RECORDS_JUDGED} records). quarantine/ in the run's folder lists them: mend them, or raise data.max_bad_frac."
            )


class RowsInTurn:
    """Blocks re-cut into this rank's part of each batch, however many rows that has."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = iter(blocks)
        self._block: Block | None = None
        self._first = 0  # row of the block that was not taken

    def take(self, num_rows: int) -> Block | None:
        """The next rows, None where not as many are left. Rows of one block are a view: nothing is copied."""
        pieces: list[Block] = []
        while num_rows:
            if self._block is None or self._first == len(self._block["ids"]):
                self._block, self._first = next(self._blocks, None), 0
                if self._block is None:
                    return None
            rows = slice(self._first, min(len(self._block["ids"]), self._first + num_rows))
            pieces.append({name: column[rows] for name, column in self._block.items()})
            num_rows -= rows.stop - rows.start
            self._first = rows.stop
        return pieces[0] if len(pieces) == 1 else {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def in_order(by_rank: np.ndarray, unit_rows: int) -> np.ndarray:
    """What every data rank holds of its rows of a batch, (data_size, rank_rows, ...), in the batch's own order, (rows, ...).

    Example: data_size=2, rank_rows=4, unit_rows=2: ranks that hold 0 1 4 5 and 2 3 6 7 of a batch give 0 1 2 3 4 5 6 7.
    """
    units = by_rank.reshape(len(by_rank), -1, unit_rows, *by_rank.shape[2:])
    return units.swapaxes(0, 1).reshape(-1, *by_rank.shape[2:])


def count_predicted(segments: Tensor, isolate: bool) -> int:
    """Tokens that the loss is over: all but padding and each row's first; with `isolate` also without each document's first."""
    label, before = segments[:, 1:], segments[:, :-1]
    valid = label != 0
    if isolate:
        valid &= label == before
    return int(valid.sum())
