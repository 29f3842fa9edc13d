"""What a probe is asked and what its processes tell, one by one. Light: the driver imports it without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProbeTask:
    """`climb`: sizes (rows of a micro-batch) to run in rising order; `time`: those to time after it, if they fit. `limit_bytes`: None for
    what the hardware has; `local_size`: processes of the group on this node."""

    climb: tuple[int, ...]
    time: tuple[int, ...]
    limit_bytes: int | None
    local_size: int = 1


@dataclass(frozen=True)
class Limit:
    limit_bytes: int


@dataclass(frozen=True)
class Trying:
    rows: int


@dataclass(frozen=True)
class Fits:
    rows: int
    peak_bytes: int


@dataclass(frozen=True)
class OutOfMemory:
    """`rows` is 0 where not even the engine could be built."""

    rows: int
    told: str


@dataclass(frozen=True)
class Timed:
    """Seconds of each step of `accumulation` microbatches."""

    rows: int
    accumulation: int
    step_s: tuple[float, ...]


Event = Limit | Trying | Fits | OutOfMemory | Timed


class RankDiedError(Exception):
    """A process of a probe ended without a word: killed by the kernel or by Ray for want of memory, or crashed in an allocation."""
