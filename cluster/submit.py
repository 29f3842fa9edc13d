"""Submits a job to a cluster, follows its log, and stops it: each as a user expects it to end."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cluster.errors import ClusterError, HeadLostError
from cluster.job_server import JobServer, JobState
from cluster.package import Package
from cluster.printable import PrintableLog, printable

BASE = "headrace_id"  # in a job's metadata: the id before a number was put behind it
STOP_WAIT_S = 60  # what a job that is asked to end gets to save; Ray's own 3 s are too few
START_S = 60.0  # the longest that stopping waits for a job to have started
ENDS_S = STOP_WAIT_S + 60.0
LOST_S = 120.0  # how long a server that was there may be away
LOOK_S = 1.0
REST_AT_MOST_S = 60.0  # between two readings of a whole log


@dataclass(frozen=True)
class Submission:
    """`is_new` is False where the same job runs already."""

    job_id: str
    is_new: bool


def submit(server: JobServer, base: str, module: str, arguments: Sequence[str], package: Package) -> Submission:
    """Starts `python -m MODULE ARGUMENTS` on the head, in the package's files, under the id `base`, or where jobs of that id have ended
    `base`-2, `base`-3, ... The same job that runs already is taken for it. Raises ClusterError where another of that id runs."""
    entrypoint = "exec " + shlex.join(["python", "-m", module, *arguments])  # exec: no shell in between that a signal could end alone
    jobs = server.jobs()
    for job in jobs:
        if base in (job.job_id, job.metadata.get(BASE)) and not job.ended:
            if (job.entrypoint, job.package) == (printable(entrypoint), package.uri):
                return Submission(job.job_id, is_new=False)
            raise ClusterError(
                f"the job {job.job_id} is {job.status.lower()}, with another command or other files. Stop it first (headrace jobs stop "
                f"{shlex.quote(job.job_id)}): the run then goes on from its last checkpoint. Or give this one a name of its own (run.name "
                "and --id)."
            )
    if not server.has_package(package.uri):
        server.upload(package.uri, package.archive)
    taken = {job.job_id for job in jobs}
    job_id, number = base, 1
    while job_id in taken:
        number += 1
        job_id = f"{base}-{number}"
    environment = {"working_dir": package.uri, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
    server.submit(job_id, entrypoint, environment, {BASE: base})
    return Submission(job_id, is_new=True)


def follow(server: JobServer, job_id: str, show: Callable[[str], None]) -> JobState:
    """Shows the log as it grows, printable, until the job has ended; a connection that breaks is made again, and no character shown twice.

    Raises HeadLostError where the server is away for longer than `LOST_S`.
    """
    shown = _Shown(PrintableLog(show))
    seen_s = time.monotonic()
    while True:
        asyncio.run(_tail(server, job_id, shown))
        asked_s, rest_s = time.monotonic(), LOOK_S
        try:
            state = server.job(job_id)
            if state.status != "PENDING":
                shown.whole(server.log(job_id))  # also where no connection for pieces came about: not every proxy lets one through
            if state.ended:
                return state
            seen_s = time.monotonic()
            # A log that is read whole each time keeps the head busy for a tenth of the time at most, however long it has become.
            rest_s = max(LOOK_S, min(9 * (seen_s - asked_s), REST_AT_MOST_S))
        except HeadLostError as error:
            if time.monotonic() - seen_s > LOST_S:
                raise HeadLostError(
                    f"the job server has been away for {LOST_S:.0f} s: {error} What became of the job is not known here; when the head is "
                    f"back, `headrace jobs logs {job_id} --follow` tells."
                ) from None
        time.sleep(rest_s)


def stop(server: JobServer, job_id: str) -> JobState:
    """Asks a job to end and returns when it has. Raises ClusterError where it does not within `ENDS_S`."""
    state = server.job(job_id)
    # One that is asked while it starts can leave processes behind that Ray knows nothing of.
    state = _wait(server, job_id, START_S, lambda now: now.status != "PENDING") or state
    if state.ended:
        return state
    server.stop(job_id)
    ended = _wait(server, job_id, ENDS_S, lambda now: now.ended)
    if ended is None:
        raise ClusterError(
            f"the job {job_id} has not ended within {ENDS_S:.0f} s of being asked to. Look at its log (headrace jobs logs {job_id}), and "
            "ask again."
        )
    return ended


def _wait(server: JobServer, job_id: str, longest_s: float, done: Callable[[JobState], bool]) -> JobState | None:
    deadline_s = time.monotonic() + longest_s
    while time.monotonic() < deadline_s:
        with suppress(HeadLostError):
            if done(state := server.job(job_id)):
                return state
        time.sleep(LOOK_S)
    return None


class _Shown:
    """Every connection tells the log from its start: what was shown before is left out."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._chars = show, 0

    def piece(self, text: str, at: int) -> None:
        """`at`: the characters before `text` in the log."""
        new = text[max(0, self._chars - at) :]
        if new:
            self._show(new)
            self._chars = at + len(text)

    def whole(self, text: str) -> None:
        self.piece(text, 0)


async def _tail(server: JobServer, job_id: str, shown: _Shown) -> None:
    at = 0
    async for text in server.tail(job_id):
        shown.piece(text, at)
        at += len(text)
