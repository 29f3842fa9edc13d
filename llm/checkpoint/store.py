"""Where checkpoints are: published folders under `<run>/checkpoints`, local or S3, newest first.

Local: written under a temporary name and renamed, one atomic act. S3 has no rename: there the manifest, put last, is that act. Either way
a folder counts only when it is named `step-...` and holds a manifest.
"""

from __future__ import annotations

import hashlib
import json

import pyarrow.fs as pafs

from llm.checkpoint.layout import MANIFEST, step_folder, step_of
from llm.config import S3Section
from llm.errors import CheckpointError
from llm.storage import join, open_storage, read_bytes, write_bytes


class CheckpointStore:
    def __init__(self, run_uri: str, s3: S3Section) -> None:
        self.uri = join(run_uri, "checkpoints")
        self.s3 = s3
        self.filesystem, self.path = open_storage(self.uri, s3)
        self._renames = not self.uri.startswith("s3://")

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, newest first."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        folders = [info for info in self.filesystem.get_file_info(selector) if info.type == pafs.FileType.Directory]
        found = [(step_of(info.base_name), info.path) for info in folders]
        return sorted(
            (
                step
                for step, path in found
                if step is not None and self.filesystem.get_file_info(f"{path}/{MANIFEST}").type == pafs.FileType.File
            ),
            reverse=True,
        )

    def writing(self, step: int) -> str:
        """The URI that a checkpoint's files are written under before it is published."""
        return join(self.uri, step_folder(step) + (".tmp" if self._renames else ""))

    def clear(self, step: int) -> None:
        """Removes what a killed save of the same step left."""
        folder = f"{self.path}/{step_folder(step)}"
        for path in (folder, f"{folder}.tmp"):
            if self.filesystem.get_file_info(path).type == pafs.FileType.Directory:
                self.filesystem.delete_dir(path)
        self.filesystem.create_dir(self.path, recursive=True)

    def publish(self, step: int, manifest: str) -> str:
        """Makes the written files a checkpoint; returns its URI."""
        write_bytes(join(self.writing(step), MANIFEST), manifest.encode(), self.s3)
        if self._renames:
            folder = f"{self.path}/{step_folder(step)}"
            self.filesystem.move(f"{folder}.tmp", folder)
        return join(self.uri, step_folder(step))

    def prune(self, keep: int) -> None:
        for step in self.steps()[keep:]:
            self.filesystem.delete_dir(f"{self.path}/{step_folder(step)}")

    def read_manifest(self, step: int) -> dict[str, dict[str, object]]:
        return json.loads(read_bytes(join(self.uri, step_folder(step), MANIFEST), self.s3))["files"]

    def read_verified(self, step: int, name: str, files: dict[str, dict[str, object]]) -> bytes:
        """A file's bytes, once its size and SHA-256 are those of the manifest."""
        uri = join(self.uri, step_folder(step), name)
        if name not in files:
            raise CheckpointError(f"{uri} is not in the checkpoint's manifest: it was saved by fewer workers than restore it now.")
        data = read_bytes(uri, self.s3)
        if len(data) != files[name]["size_bytes"] or hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
            raise CheckpointError(
                f"{uri} is damaged: its size or SHA-256 is not what the manifest says. Remove the folder "
                f"{step_folder(step)} to go on from the checkpoint before it."
            )
        return data
