"""How the readers of the stream tell its tasks where to begin. Apart from `llm/data/stream.py`, which is heavy to import."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from llm.config import S3Section
from llm.data.order import Cursor
from llm.storage import read_bytes, write_bytes


@dataclass(frozen=True)
class StartFile:
    """Where the stream's current pass begins: written by the first reader before all readers begin, read by every task."""

    uri: str
    s3: S3Section

    def write(self, cursor: Cursor) -> None:
        write_bytes(self.uri, json.dumps(asdict(cursor)).encode(), self.s3)

    def read(self) -> Cursor:
        found = json.loads(read_bytes(self.uri, self.s3))
        return Cursor(found["epoch"], found["window"], found["offset"], tuple(found["began"]))
