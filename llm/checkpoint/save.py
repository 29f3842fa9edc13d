"""Saves checkpoints while training goes on.

Weights and moments change in the optimizer's update only. So `save` returns at once, a thread copies them to host memory while the next
forward and backward passes run, and only the next update waits for the copy (`wait_snapshot`). The thread then writes, hashes, publishes.
A save that comes while the last one is being written waits for it: dropping one would make what is saved depend on the disk's speed, and
memory holds one snapshot. The ranks' threads agree over a process group of their own: collectives of two threads on one would mix.

A save that failed on any rank is published by none. The error is raised on every rank by the next save, or at the end; what was published
before stays.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from llm.checkpoint.fragments import Ownership
from llm.checkpoint.index import INDEX, merge
from llm.checkpoint.layout import STATE, Layout, rank_file
from llm.checkpoint.manifest import FileEntry
from llm.checkpoint.snapshot import HostBuffer, Plan, plan_snapshot
from llm.checkpoint.store import CheckpointStore
from llm.checkpoint.together import bytes_of_all, bytes_of_first, together
from llm.errors import CheckpointError, StorageError
from llm.parallel.zero import Engine
from llm.state import TrainState

SLOWEST_WRITE = timedelta(hours=2)  # so long a rank waits for the slowest one's file
LEFT_ALONE_S = 60.0  # so long a run that fails waits for the save that is under way


@dataclass(frozen=True)
class Saved:
    """`took_s`: from the call of `save` to the publication. `stall_s`: how long training stood still for it. `unpruned`: why older ones
    could not be removed, which the next save tries again."""

    step: int
    uri: str
    took_s: float
    stall_s: float
    unpruned: str = ""


@dataclass
class _Save:
    state: TrainState
    plan: Plan
    shared: bytes  # state.json
    began_s: float
    stall_s: float = 0.0
    copied: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    uri: str = ""
    took_s: float = 0.0
    unpruned: str = ""
    error: BaseException | None = None


class CheckpointSaver:
    """Every method but `finished` must be called by all ranks, in the same order, by the training thread. As a context manager it waits for
    the last save to be published, and raises its error."""

    def __init__(self, engine: Engine, layout: Layout, store: CheckpointStore, *, keep: int, keep_every: int = 0) -> None:
        self._engine = engine
        self._layout = layout
        self._store = store
        self._keep = keep
        self._keep_every = keep_every
        self._ownership = Ownership(engine)
        self._buffer = HostBuffer(engine.device)
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST_WRITE)
        self._current: _Save | None = None
        self._finished: list[Saved] = []

    def save(self, state: TrainState) -> None:
        """Begins to save the state after `state.step` steps. Waits for the save before it, and raises its CheckpointError."""
        began_s = time.perf_counter()
        self._join()
        save = _Save(state, plan_snapshot(self._engine, self._ownership), self._state_json(state), began_s)
        save.thread = threading.Thread(target=self._run, args=(save,), name=f"save-{state.step}", daemon=True)
        self._current = save
        save.thread.start()
        if self._layout.optimizer == "muon":
            save.copied.wait()  # DeepSpeed moves Muon's momentum within the backward pass
        save.stall_s = time.perf_counter() - began_s

    def wait_snapshot(self) -> None:
        """Returns when weights and moments may change: to be called before every update, and before anything else that changes them."""
        if self._current is not None and not self._current.copied.is_set():
            began_s = time.perf_counter()
            self._current.copied.wait()
            self._current.stall_s += time.perf_counter() - began_s

    def save_now(self, state: TrainState) -> None:
        """Saves and returns when it is published. Raises CheckpointError on every rank when one could not write."""
        began_s = time.perf_counter()
        self.save(state)
        assert self._current is not None and self._current.thread is not None
        self._current.thread.join()
        self._current.stall_s = time.perf_counter() - began_s
        self._join()

    @property
    def is_saving(self) -> bool:
        """Whether this rank's thread is still at work on a save."""
        return self._current is not None and self._current.thread is not None and self._current.thread.is_alive()

    def wait_published(self) -> None:
        """Returns when the save that is under way, if any, is published. Raises its CheckpointError on every rank."""
        self._join()

    def finished(self) -> list[Saved]:
        """The saves that were published since the last call, oldest first."""
        if self._current is not None and not self.is_saving and self._current.error is None:
            self._join()
        found, self._finished = self._finished, []
        return found

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self._join()
        elif self._current is not None and self._current.thread is not None:
            self._current.thread.join(LEFT_ALONE_S)  # the other ranks may be gone; the error that ends the run is the one to show

    def _join(self) -> None:
        save, self._current = self._current, None
        if save is None or save.thread is None:
            return
        save.thread.join()
        if save.error is not None:
            raise save.error
        self._finished.append(Saved(save.state.step, save.uri, save.took_s, save.stall_s, save.unpruned))

    def _run(self, save: _Save) -> None:
        try:
            save.uri = self._write(save)
        except BaseException as error:  # raised by the training thread
            save.error = error
        finally:
            save.copied.set()
            save.took_s = time.perf_counter() - save.began_s

    def _write(self, save: _Save) -> str:
        """Copies, writes and publishes; returns the URI. All ranks' threads run it in step."""
        step, first = save.state.step, self._engine.mesh.rank == 0
        together(lambda: self._copy(save), "copy its part of the checkpoint", self._group)
        begun = together(lambda: self._store.begin(step) if first else "", "begin the checkpoint", self._group)
        folder = bytes_of_first(begun.encode(), self._group).decode()
        name = rank_file(self._engine.mesh.rank)
        chunks = self._buffer.chunks(save.plan)
        try:
            entry = together(lambda: self._store.write(folder, name, chunks), "write its part of the checkpoint", self._group)
            told = bytes_of_all(save.plan.told, self._group)
            entries = [FileEntry.from_json(json.loads(each)) for each in bytes_of_all(json.dumps(entry.to_json()).encode(), self._group)]
            uri = together(lambda: self._publish(save, folder, told, entries) if first else "", "publish the checkpoint", self._group)
        except CheckpointError:
            if first:
                with suppress(StorageError):
                    self._store.abandon(folder)
            raise
        if first:
            save.unpruned = self._prune()
        return uri

    def _prune(self) -> str:
        """What went wrong. The checkpoint is published by now, so that is no reason to give it up."""
        try:
            self._store.prune(keep=self._keep, keep_every=self._keep_every)
        except (StorageError, CheckpointError) as error:
            return str(error)
        return ""

    def _copy(self, save: _Save) -> None:
        try:
            self._buffer.copy(save.plan)
        finally:
            save.copied.set()

    def _publish(self, save: _Save, folder: str, told: list[bytes], of_ranks: list[FileEntry]) -> str:
        entries = {rank_file(rank): entry for rank, entry in enumerate(of_ranks)}
        index = merge(told, {name: entry.size_bytes for name, entry in entries.items()})
        for name, data in ((INDEX, index.to_json()), (STATE, save.shared)):
            entries[name] = self._store.write(folder, name, [data])
        return self._store.publish(save.state.step, folder, entries)

    def _state_json(self, state: TrainState) -> bytes:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        scale: dict[str, Any] = (
            {key: value for key, value in vars(scaler).items() if isinstance(value, int | float | bool)} if scaler is not None else {}
        )
        told = {"train": state.to_json(), "layout": asdict(self._layout), "loss_scaler": scale}
        return json.dumps(told, indent=1, allow_nan=False).encode()
