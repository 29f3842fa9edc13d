"""Why a worker group failed, and whether it is worth starting again. Pure: Ray's errors are known by their names and texts here.

A dead worker takes its peers with it, which fail in their collectives: of all errors the one that explains most is the cause.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from llm.config import RecoverySection
from llm.errors import (
    CheckpointError,
    HangError,
    HeadraceError,
    PlannedStop,
    StorageError,
)
from llm.redact import without_secrets

BUDGET_WINDOW_S = 24 * 3600.0
LONGEST_WAIT_S = 60.0


class Cause(Enum):
    """In the order in which they explain a failure: the first found is the cause."""

    REFUSED = "error"  # ours, in the configuration, data or numbers: the same again would be the same again
    PLANNED = "planned stop"
    PREEMPTED = "preemption"
    NODE_LOST = "node lost"
    OUT_OF_MEMORY = "out of memory"
    HANG = "hang"
    STORAGE_FULL = "storage full"
    STORAGE = "storage"
    CONTROLLER = "controller crash"  # of Ray's own process that starts and watches the workers; known to the driver
    CRASH = "worker crash"
    BUG = "program error"
    LOST_PEER = "lost connection"  # what a crash looks like from another worker
    NO_ROOM = "no room for the workers"


NEVER_RETRIED = (Cause.REFUSED, Cause.BUG)
FREE = (Cause.PLANNED, Cause.PREEMPTED, Cause.NO_ROOM)  # nobody's fault: they use up no budget
_ORDER = list(Cause)
_SOURCE_LINE = re.compile(r"^\[\S*\] ")  # "[/path/pair.cc:553] Connection closed by peer": where in torch
_PEER_LOST = re.compile(r"gloo|pair\.cc|NCCL|ProcessGroup|[Cc]onnection|peer|socket|[Bb]roken pipe|[Tt]imed out|[Tt]imeout|TCPStore")


@dataclass(frozen=True)
class Failure:
    cause: Cause
    ranks: tuple[int, ...]
    told: str  # one line for the user

    def __str__(self) -> str:
        who = f"rank {', '.join(map(str, self.ranks))}: " if self.ranks else ""
        return f"{self.cause.value} ({who}{self.told})"


def failure_of(failures: Mapping[int, BaseException]) -> Failure:
    """The failure that explains all ranks' errors."""
    found = {rank: _cause_of(error) for rank, error in failures.items()}
    first = min((cause for cause, _ in found.values()), key=_ORDER.index)
    ranks = tuple(rank for rank, (cause, _) in sorted(found.items()) if cause is first)
    return Failure(first, ranks, found[ranks[0]][1])


def _cause_of(error: BaseException) -> tuple[Cause, str]:
    error = _innermost(error)
    name, text = type(error).__name__, without_secrets(str(error))
    line = next((line.strip() for line in text.splitlines() if line.strip()), name)[:300]
    if isinstance(error, HeadraceError):
        return _cause_of_ours(error), line
    if name.startswith("Actor") or name in ("RayActorError", "WorkerHealthCheckTimeoutError"):
        return _cause_of_death(error, text)
    if name == "OutOfMemoryError":
        on_gpu = type(error).__module__.startswith("torch")
        return Cause.OUT_OF_MEMORY, line if on_gpu else "killed by Ray because its node ran out of memory"
    if getattr(error, "errno", None) in (28, 122) or "No space left" in text:
        return Cause.STORAGE_FULL, line
    # A collective that lost its peer is a RuntimeError of torch, and so is a fault of a GPU; Ray's own errors come from a lost object or
    # process.
    if isinstance(error, RuntimeError | OSError) or type(error).__module__.startswith("ray."):
        if _PEER_LOST.search(text):
            return Cause.LOST_PEER, _SOURCE_LINE.sub("", line).split(". ")[0]
        return Cause.CRASH, f"{name}: {line}"
    return Cause.BUG, f"{name}: {line}"


def _cause_of_ours(error: HeadraceError) -> Cause:
    if isinstance(error, PlannedStop):
        return Cause.PLANNED
    if isinstance(error, HangError):
        return Cause.HANG
    if isinstance(error, StorageError | CheckpointError):
        return Cause.STORAGE_FULL if "No space left" in str(error) or "quota" in str(error).lower() else Cause.STORAGE
    return Cause.REFUSED


def _cause_of_death(error: BaseException, text: str) -> tuple[Cause, str]:
    if getattr(error, "preempted", False):
        return Cause.PREEMPTED, "its node was taken away"
    lowered = text.lower()
    if "node_out_of_memory" in lowered or "running low on memory" in lowered or "memory pressure" in lowered:
        return Cause.OUT_OF_MEMORY, "killed by Ray because its node ran out of memory"
    if "node has died" in lowered or "node was terminated" in lowered or "node died" in lowered or "node is dead" in lowered:
        return Cause.NODE_LOST, "its node went away"
    if "exit code" in lowered:
        code = lowered.split("exit code", 1)[1].split()[0].strip("=:.,'\"")
        return Cause.CRASH, f"its process ended with exit code {code}"
    return Cause.CRASH, "its process was killed"


def _innermost(error: BaseException) -> BaseException:
    """What Ray wraps: the error of a health check, of a task, of a user's function."""
    for _ in range(8):
        inner = (getattr(error, name, None) for name in ("_base_exc", "health_check_failure", "cause"))
        wrapped = next((cause for cause in inner if isinstance(cause, BaseException)), None)
        if wrapped is None or wrapped is error:
            break
        error = wrapped
    return error


@dataclass(frozen=True)
class Verdict:
    """Either a restart after `wait_s`, or `gave_up`: why not."""

    wait_s: float = 0.0
    gave_up: str | None = None


@dataclass
class Budget:
    """What is left of each cause's restarts; stops a run that crashes again and again without a newer step."""

    limits: RecoverySection
    furthest_step: int = 0
    stuck: list[Failure] = field(default_factory=list)  # restarts since the furthest step moved
    restarts: dict[Cause, deque[float]] = field(default_factory=dict)  # when, by cause

    def judge(self, failure: Failure, step: int, now_s: float) -> Verdict:
        """`step`: the last that the failed group is known to have done."""
        if failure.cause in NEVER_RETRIED:
            return Verdict(gave_up=failure.told)
        if step > self.furthest_step:
            self.furthest_step, self.stuck = step, []
        if failure.cause not in (Cause.PLANNED, Cause.NO_ROOM):
            self.stuck.append(failure)
        if len(self.stuck) > self.limits.max_without_progress:
            told = "\n".join(f"  {number}. {one}" for number, one in enumerate(self.stuck, 1))
            return Verdict(
                gave_up=f"no step after {self.furthest_step} was reached in {self.limits.max_without_progress} restarts:\n{told}\n"
                "  Mend what fails there, and run the same command: it goes on from the last checkpoint."
            )
        key, limit = self._limit(failure.cause)
        if limit is not None:
            recent = self.restarts.setdefault(failure.cause, deque())
            while recent and recent[0] < now_s - BUDGET_WINDOW_S:
                recent.popleft()
            if len(recent) >= limit:
                first = "Free some space there. " if failure.cause is Cause.STORAGE_FULL else ""
                return Verdict(
                    gave_up=f"{failure}; recovery.{key}={limit} restarts in 24 hours are used up. {first}The same command goes on."
                )
            recent.append(now_s)
        without = len(self.stuck)
        return Verdict(0.0 if without < 2 else min(LONGEST_WAIT_S, self.limits.first_wait_s * 2 ** (without - 2)))

    def recast(self, cause: Cause, as_cause: Cause) -> None:
        """The last restart turned out to have another cause."""
        if recent := self.restarts.get(cause):
            self.restarts.setdefault(as_cause, deque()).append(recent.pop())

    def _limit(self, cause: Cause) -> tuple[str, int | None]:
        if cause in FREE:
            return "", None
        key = {
            Cause.OUT_OF_MEMORY: "max_out_of_memory",
            Cause.NODE_LOST: "max_node_losses",
            Cause.HANG: "max_hangs",
            Cause.STORAGE: "max_storage_errors",
            Cause.STORAGE_FULL: "max_storage_errors",
        }.get(cause, "max_crashes")
        return key, getattr(self.limits, key)
