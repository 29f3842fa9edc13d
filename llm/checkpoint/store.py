"""A run's checkpoints, on a disk or on S3: begun, written by every rank, published by one atomic act, pruned, read back verified.

    folder = store.begin(96)                                     rank 0; the name goes to all ranks
    entry = store.write(folder, "rank-00003.safetensors", ...)   any rank; the entries go to rank 0
    store.publish(96, folder, entries)                           rank 0
    store.prune(keep=3, keep_every=0)                            rank 0

    published = store.open(96)                                   any process; then read, read_range: see llm/checkpoint/published.py

Readers see published checkpoints only, newest first: see llm/checkpoint/newest.py. What is where: `on_disk.py`, `on_s3.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llm.checkpoint.layout import step_folder
from llm.checkpoint.manifest import FileEntry, Manifest, require_file_name
from llm.checkpoint.on_disk import DiskCheckpoints
from llm.checkpoint.on_s3 import S3Checkpoints
from llm.checkpoint.published import Published
from llm.config import S3Section
from llm.errors import CheckpointError, DamagedCheckpointError
from llm.storage import is_s3, join, local_path, storage_errors

SAFE = 2  # so many good checkpoints are never pruned


class CheckpointStore:
    """`fence` is called right before a checkpoint is published, set aside or removed, and raises where another driver has taken the run
    over. All methods raise StorageError where the disk or S3 fails."""

    def __init__(self, run_uri: str, s3: S3Section, fence: Callable[[], None] | None = None) -> None:
        self.uri = join(run_uri, "checkpoints")
        self.s3 = s3
        self._fence = fence or (lambda: None)
        with storage_errors(self.uri, s3):
            self._files = S3Checkpoints(self.uri, s3) if is_s3(self.uri) else DiskCheckpoints(local_path(self.uri))
        self._known_good: dict[int, tuple[Manifest, object]] = {}  # what was hashed by this process, and what it looked like then

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, newest first. Looks at names only."""
        with storage_errors(self.uri, self.s3, doing="list"):
            return self._files.steps()

    def begin(self, step: int) -> str:
        """Rank 0: the name of a new folder for this attempt to save `step`; what older attempts left is removed, whether their processes
        live or not. A damaged checkpoint of the same step is set aside.

        Raises CheckpointError where a good one is there: who goes back before a checkpoint must set it aside first.
        """
        self._fence()
        if step in self.steps():
            if not self._damage(step):
                raise CheckpointError(
                    f"{self.path_of(step)} is there already, and whole. A run that goes back before it must set it aside first."
                )
            self.set_aside(step)
        with storage_errors(self.path_of(step), self.s3, doing="write"):
            return self._files.begin(step, uuid.uuid4().hex[:16])

    def write(self, folder: str, name: str, chunks: Iterable[Any]) -> FileEntry:
        """Any rank: writes a file of `folder` from pieces (contiguous buffers), hashed on the way; it is durable when
        this returns. A file that fails half-way is gone. Memory: a piece, on S3 up to 4 parts of 32 MiB."""
        require_file_name(name)
        with storage_errors(join(self.uri, folder, name), self.s3, doing="write"):
            return self._files.write(folder, name, chunks)

    def publish(self, step: int, folder: str, entries: Mapping[str, FileEntry]) -> str:
        """Rank 0: makes `folder` the checkpoint of `step`, durably, and returns its URI. `entries`: of all files of all ranks.

        Raises CheckpointError where another driver published that step first, or where a file is not there as it was written.
        """
        inside = folder.partition("/")[2]  # on S3 the files stay where they are
        manifest = Manifest(step, inside, dict(entries))
        data = manifest.to_bytes()
        Manifest.from_bytes(data, step, self.path_of(step))  # what could not be read is not published
        with storage_errors(self.path_of(step), self.s3, doing="write"):
            self._files.require_written(folder, dict(entries))
            self._files.publish(step, folder, data, self._fence)
            self._known_good[step] = (manifest, self._files.signature(step, inside, entries))
        return self.path_of(step)

    def abandon(self, folder: str) -> None:
        """Removes what was written of a save that will not be published: a full disk has room again."""
        with storage_errors(join(self.uri, folder), self.s3, doing="remove"):
            self._files.abandon(folder)

    def prune(self, keep: int, keep_every: int = 0) -> list[int]:
        """Rank 0: removes all checkpoints but the `keep` newest, those of multiples of `keep_every` steps (0: none), and, whatever these
        numbers are, the SAFE newest good ones. Returns the steps that were removed.

        Good: this process wrote or hashed it and its files look the same since; else it is hashed now.
        """
        good, removed = 0, []
        steps = self.steps()
        spared = {step for i, step in enumerate(steps) if i < keep or (keep_every and step % keep_every == 0)}
        if len(spared) == len(steps):
            return []
        for step in steps:
            if good < SAFE:
                good += not self._damage(step)
            elif step not in spared:
                self._fence()
                with storage_errors(self.path_of(step), self.s3, doing="remove"):
                    self._files.remove(step, uuid.uuid4().hex[:16])
                removed.append(step)
        return removed

    def set_aside(self, step: int) -> str:
        """Rank 0: makes a checkpoint invisible without removing it, because it is damaged, or because the run goes on from before it.
        Returns where it is now."""
        self._fence()
        self._known_good.pop(step, None)
        with storage_errors(self.path_of(step), self.s3, doing="set aside"):
            return self._files.set_aside(step, uuid.uuid4().hex[:16])

    def open(self, step: int) -> Published:
        """A published checkpoint, its manifest checked. Raises DamagedCheckpointError."""
        with storage_errors(self.path_of(step), self.s3):
            return Published(self._files, self.path_of(step), self.s3, step)

    def _damage(self, step: int) -> list[str]:
        """What is wrong with a checkpoint, [] where nothing is. Hashes all its bytes unless this process did so before."""
        try:
            published = self.open(step)
            known = self._known_good.get(step)
            with storage_errors(self.path_of(step), self.s3):
                signature = self._files.signature(step, published.manifest.folder, published.files)
            if known == (published.manifest, signature):
                return []
            found = published.damage()
        except DamagedCheckpointError as error:
            return [str(error)]
        if not found:
            self._known_good[step] = (published.manifest, signature)
        return list(found.values())

    def path_of(self, step: int) -> str:
        """The URI of a checkpoint's folder, be it there or not."""
        return join(self.uri, step_folder(step))
