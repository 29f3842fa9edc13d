"""One driver a run: a lease with a fencing number, in the run's own storage.

`<run>/lease/00000007.json` is the seventh lease. It is made by an act that only one contender can succeed in (a hard link, or a create-only
PUT), and its owner writes a heartbeat into it. Whoever finds no living owner makes the next number. So a number is never held twice, and an
owner that was replaced, however long it slept, sees it by one look: the next number exists. Its workers look before they publish a
checkpoint or write metrics.

A dead owner on the same machine is known by its process, elsewhere by a heartbeat that stands still for `recovery.lease_s`: no clocks
are compared.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pyarrow import fs as pafs

from llm.config import S3Section
from llm.errors import HeadraceError, LeaseError, StorageError
from llm.s3 import s3_client
from llm.storage import exists, is_s3, join, local_path, open_storage, read_bytes, split_s3, storage_errors, write_bytes

KEPT = 16  # leases before the newest; older files are removed
BEATS_PER_LEASE = 5


@dataclass(frozen=True)
class Fence:
    """What a worker holds of its driver's lease. Picklable."""

    run_uri: str
    s3: S3Section
    number: int

    def check(self) -> None:
        """Raises LeaseError where another driver has taken the run over."""
        if exists(_uri(self.run_uri, self.number + 1), self.s3):
            raise LeaseError(
                f"another driver has taken over {self.run_uri} (lease {self.number + 1}; this one's was {self.number}): this one stops."
            )


class Lease:
    """The driver's own: beats in a thread from `held_lease` on."""

    def __init__(self, run_uri: str, s3: S3Section, lease_s: float, number: int) -> None:
        self.fence = Fence(run_uri, s3, number)
        self._every_s = lease_s / BEATS_PER_LEASE
        self._owner, self._beat = uuid.uuid4().hex, 0
        self._lost: LeaseError | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def acquire(self) -> bool:
        """Whether this contender is the one that made the number."""
        if not _create(self.fence.run_uri, self.fence.s3, self.fence.number, self._text()):
            return False
        self._thread.start()
        return True

    def require(self) -> None:
        """Raises LeaseError where the heartbeat's thread has seen another driver; asks no storage."""
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Lets the next driver in at once."""
        self._released.set()
        self._thread.join()
        with suppress(StorageError):
            if self._lost is None:
                self._write(released=True)

    def _keep(self) -> None:
        while not self._released.wait(self._every_s):
            try:
                self.fence.check()
                self._beat += 1
                self._write()
            except LeaseError as error:
                self._lost = error
                return
            except StorageError:
                continue  # the next beat may come through; if it does not, another driver may

    def _write(self, released: bool = False) -> None:
        write_bytes(_uri(self.fence.run_uri, self.fence.number), self._text(released), self.fence.s3, durable=False)

    def _text(self, released: bool = False) -> bytes:
        me = psutil.Process()
        fields = {"owner": self._owner, "fence": self.fence.number, "host": socket.gethostname(), "machine": _machine(), "pid": me.pid}
        fields |= {"started_at_s": me.create_time(), "heartbeat": self._beat, "released": released}
        return json.dumps(fields).encode()


@contextmanager
def held_lease(run_uri: str, s3: S3Section, lease_s: float, note: Callable[[str], None] = print) -> Iterator[Lease]:
    """The run is this process's alone inside. Raises LeaseError where another driver lives; where only waiting tells, waits `lease_s`."""
    while True:
        newest = _newest(run_uri, s3)
        if newest:
            _await_end(run_uri, s3, newest, lease_s, note)
        lease = Lease(run_uri, s3, lease_s, newest + 1)
        if lease.acquire():
            break
    _forget_old(run_uri, s3, newest - KEPT)
    try:
        yield lease
    finally:
        lease.release()


def _await_end(run_uri: str, s3: S3Section, number: int, lease_s: float, note: Callable[[str], None]) -> None:
    """Returns once the owner of a lease is known to be gone; LeaseError where it is alive."""
    first = _read(run_uri, s3, number)
    if first is None or first.get("released"):
        return
    told = f"pid {first.get('pid')} on {first.get('host')}"
    living = LeaseError(
        f"{run_uri} is being trained by another driver ({told}): two would overwrite each other's results. Wait for it, stop it, or choose "
        "another run.name."
    )
    if first.get("machine") == _machine():
        if _alive(first):
            raise living
        return
    note(f"another driver ({told}) may still be training {run_uri}: watching its heartbeat for {lease_s:.0f} s")
    deadline_s = time.monotonic() + lease_s
    while time.monotonic() < deadline_s:
        time.sleep(min(1.0, lease_s / BEATS_PER_LEASE))
        now = _read(run_uri, s3, number)
        if now is None or now.get("released"):
            return
        if now.get("heartbeat") != first.get("heartbeat"):
            raise living


def _alive(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(owner["pid"]))
        return abs(process.create_time() - float(owner["started_at_s"])) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _machine() -> str:
    """Where process ids mean the same processes: a boot of a machine, and a namespace in it."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    return f"{socket.gethostname()}/{uuid.getnode()}"


def _uri(run_uri: str, number: int) -> str:
    return join(run_uri, "lease", f"{number:08d}.json")


def _read(run_uri: str, s3: S3Section, number: int) -> dict[str, Any] | None:
    """A lease's fields; None where it is gone or no lease."""
    try:
        found = json.loads(read_bytes(_uri(run_uri, number), s3))
    except ValueError:  # a power loss can leave a file without its bytes: nobody is named, only the heartbeat tells
        return {}
    except StorageError:
        if exists(run_uri, s3) and not exists(_uri(run_uri, number), s3):
            return None
        raise
    return found if isinstance(found, dict) else None


def _numbers(run_uri: str, s3: S3Section) -> list[int]:
    folder = join(run_uri, "lease")
    filesystem, path = open_storage(folder, s3)
    with storage_errors(folder, s3, doing="list"):
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(int(info.base_name[:8]) for info in infos if re.fullmatch(r"\d{8}\.json", info.base_name))


def _newest(run_uri: str, s3: S3Section) -> int:
    return max(_numbers(run_uri, s3), default=0)


def _forget_old(run_uri: str, s3: S3Section, before: int) -> None:
    filesystem, path = open_storage(join(run_uri, "lease"), s3)
    with suppress(HeadraceError, OSError):
        for number in _numbers(run_uri, s3):
            if number < before:
                filesystem.delete_file(f"{path}/{number:08d}.json")


def _create(run_uri: str, s3: S3Section, number: int, text: bytes) -> bool:
    """Whether the lease was made here, and not by another contender before."""
    uri = _uri(run_uri, number)
    if is_s3(uri):
        bucket, key = split_s3(uri)
        with storage_errors(uri, s3, doing="write"):
            try:
                s3_client(s3).put_object(Bucket=bucket, Key=key, Body=text, IfNoneMatch="*")
            except Exception as error:  # botocore's own class is made at run time
                response = getattr(error, "response", None) or {}
                if response.get("ResponseMetadata", {}).get("HTTPStatusCode") not in (409, 412):
                    raise
                return _is_ours(uri, s3, text)  # a PUT that was answered by an error and tried again may have been carried out
        return True
    path = Path(local_path(uri))
    with storage_errors(uri, s3, doing="write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with beside.open("xb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.link(beside, path)
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
    return True


def _is_ours(uri: str, s3: S3Section, text: bytes) -> bool:
    try:
        return read_bytes(uri, s3) == text
    except StorageError:
        return False
