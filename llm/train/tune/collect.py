"""One probe's group of processes, listened to until it ends or one of them has no memory left; and the search over such probes.

Knows neither Ray nor torch: a rank is an iterator of events, which raises RankDiedError where its process died.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from llm.errors import HeadraceError, TrainingError
from llm.train.tune.events import Event, Fits, Limit, OutOfMemory, ProbeTask, RankDiedError, Timed, Trying
from llm.train.tune.memory_model import MARGIN_FRAC, MAX_PROBES, Search, legal_rows, within_margin
from llm.train.tune.speed import Speed, speed_of

GRACE_S = 5.0  # after a rank's error: it may only have lost a peer, whose end is about to be heard of

# Starts a group of fresh processes for a task; leaving it ends them all.
StartProbe = Callable[[ProbeTask], AbstractContextManager[Sequence[Iterator[Event]]]]


@dataclass
class Found:
    """What one probe told. `failed`: the size that ran out of memory, and what was seen."""

    limit_bytes: int | None = None
    peaks: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    samples: dict[tuple[int, int], tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """All probes together. `speed` is None where nothing fitted."""

    search: Search
    speed: Speed | None
    tasks: tuple[ProbeTask, ...]

    @property
    def usable_rows(self) -> int | None:
        """The largest size that fitted with something to spare."""
        return within_margin(self.search, MARGIN_FRAC)


def search_largest(rank_rows: int, limit_bytes: int | None, start: StartProbe, tell: Callable[[str], None], timeout_s: float) -> Measured:
    """Probes until the largest micro-batch that fits is known, and how fast it and the smaller ones are: at most MAX_PROBES groups.

    Raises what a rank raises, apart from running out of memory, and TrainingError where a probe is silent for `timeout_s`.
    """
    search = Search(legal_rows(rank_rows), limit_bytes=limit_bytes)
    samples: list[dict[tuple[int, int], tuple[float, ...]]] = []
    tasks: list[ProbeTask] = []
    while sizes := _next_sizes(search, samples):
        task = ProbeTask(sizes, _to_time(search, sizes), search.limit_bytes)
        tell(f"probe {search.probes + 1}: micro-batches of {', '.join(map(str, sizes))} rows")
        with start(task) as ranks:
            found = listen(ranks, task, timeout_s)
        search = search.after(found.peaks, found.failed, found.limit_bytes)
        samples.append(found.samples)
        tasks.append(task)
    return Measured(search, speed_of(samples), tuple(tasks))


def _next_sizes(search: Search, samples: Sequence[dict[tuple[int, int], tuple[float, ...]]]) -> tuple[int, ...]:
    """What the search asks for; before its last probe goes, the size to use where nothing has timed it: the process that ran it ended
    before, or a margin asks for a smaller one."""
    timed, rows = {rows for probe in samples for rows, _ in probe}, within_margin(search, MARGIN_FRAC)
    untimed = (rows,) if rows and rows not in timed else ()
    left = MAX_PROBES - search.probes
    return () if left < 1 else untimed if untimed and left == 1 else search.next_sizes() or untimed


def _to_time(search: Search, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """All legal sizes up to the largest that is tried: in one process, in turn, they can be compared."""
    return tuple(rows for rows in search.legal if rows <= sizes[-1] and rows not in search.failed)


def listen(ranks: Sequence[Iterator[Event]], task: ProbeTask, timeout_s: float) -> Found:
    """What the group tells, to its end: all ranks done, or one out of memory. A rank that dies at a size has had no memory for it."""
    heard: queue.Queue[tuple[int, Event | BaseException | None]] = queue.Queue()
    for rank, events in enumerate(ranks):
        threading.Thread(target=_forward, args=(rank, events, heard), name=f"probe-rank-{rank}", daemon=True).start()
    found, running = Found(), len(ranks)
    trying, died_at, problem = dict.fromkeys(range(len(ranks)), 0), task.climb[0], None
    fitted: dict[int, set[int]] = {}
    deadline_s = None
    while running:
        try:
            wait_s = timeout_s if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            rank, event = heard.get(timeout=wait_s)
        except queue.Empty:
            if problem is not None:
                raise problem from None
            raise TrainingError(f"a probe of {task.climb} rows gave no sign for {timeout_s:.0f} s: its ranks wait for each other") from None
        if event is None:
            running -= 1
        elif isinstance(event, Limit):
            found.limit_bytes = event.limit_bytes
        elif isinstance(event, Trying):
            trying[rank] = event.rows
        elif isinstance(event, Fits):
            fitted.setdefault(event.rows, set()).add(rank)
            if len(fitted[event.rows]) == len(ranks):
                found.peaks[event.rows] = event.peak_bytes
        elif isinstance(event, Timed) and rank == 0:
            found.samples[event.rows, event.accumulation] = event.step_s
        elif isinstance(event, (OutOfMemory, RankDiedError)):
            rows = event.rows if isinstance(event, OutOfMemory) else trying[rank]
            told = event.told if isinstance(event, OutOfMemory) else str(event)
            return _without_memory(found, rows or died_at, f"rank {rank}: {told}")
        elif isinstance(event, BaseException):
            problem = problem or (event if isinstance(event, HeadraceError) else TrainingError(f"a probe failed on rank {rank}: {event}"))
            deadline_s = deadline_s or time.monotonic() + GRACE_S
            running -= 1
            if isinstance(event, HeadraceError):
                raise event
    if problem is not None:
        raise problem
    return found


def _without_memory(found: Found, rows: int, told: str) -> Found:
    """Sizes that had fitted stay so, but not one that ran out of memory later: while it was timed."""
    found.failed[rows] = told
    found.peaks = {fitting: peak for fitting, peak in found.peaks.items() if fitting < rows}
    return found


def _forward(rank: int, events: Iterator[Event], heard: queue.Queue[tuple[int, Event | BaseException | None]]) -> None:
    try:
        for event in events:
            heard.put((rank, event))
    except BaseException as error:
        heard.put((rank, error))
    else:
        heard.put((rank, None))
