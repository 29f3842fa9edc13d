"""Whether a process may write, read and delete under a URI, by doing so with a small object."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

from llm.config import S3Section
from llm.errors import StorageError
from llm.s3 import s3_client
from llm.storage import is_s3, join, local_path, read_bytes, split_s3, storage_errors, write_bytes

PREFIX = ".headrace-doctor-"
SMALL_BYTES = 64 << 10


def check_storage(uri: str, s3: S3Section, shared: tuple[str, bytes] | None = None) -> None:
    """Puts, gets, compares and deletes an object of its own under `uri`. `shared`: the name and bytes of one that another node has put
    there, which must be seen here too. Raises StorageError."""
    if shared is not None:
        name, data = shared
        if read_bytes(join(uri, name), s3) != data:
            raise StorageError(f"{uri}: holds other bytes here than where the driver wrote them: it is no shared folder")
    put = put_object(uri, s3)
    try:
        if read_bytes(join(uri, put[0]), s3) != put[1]:
            raise StorageError(f"{uri}: gave other bytes back than were written")
    finally:
        delete_object(uri, put[0], s3)


def put_object(uri: str, s3: S3Section) -> tuple[str, bytes]:
    """Writes a small object under `uri`; its name and bytes. Raises StorageError."""
    name = f"{PREFIX}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
    data = os.urandom(SMALL_BYTES)
    write_bytes(join(uri, name), data, s3)
    return name, data


def delete_object(uri: str, name: str, s3: S3Section) -> None:
    """Raises StorageError where it may not."""
    whole = join(uri, name)
    with storage_errors(whole, s3, doing="delete"):
        if is_s3(uri):
            bucket, key = split_s3(whole)
            s3_client(s3).delete_object(Bucket=bucket, Key=key)  # pyarrow would put an empty folder in its place
        else:
            Path(local_path(whole)).unlink()
