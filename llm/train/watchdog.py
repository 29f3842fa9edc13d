"""Finds a rank that stopped: every rank's watchdog thread knows how far its own training is, and asks the others' when that stands still.

The ranks tell each other through torch's TCPStore, by connections of their own, so that they can while the training threads hang. On a hang
each rank writes all its threads' stacks to the run's logs and says where it is; the ranks that are a step behind, or not inside a
collective, or do not answer at all, are the ones that the others wait for. Then `on_hang` ends this worker, and recovery starts the group
again.

Example: rank 1 sleeps in its forward pass of step 40. Rank 0 has waited for it in the gradients' all-reduce for 10 s. Both watchdogs see no
step in 10 s; rank 0 tells "40 all_reduce", rank 1 "40 forward (loss.py:31)": rank 1 did not arrive.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from llm.errors import HangError

HANG_EXIT_CODE = 97
STEPS_KEPT = 200  # of which the slowest but 1% says what is usual
HANG_STEPS = 5
MARGIN = 0.8  # of the allowed time, after which a step counts as hanging: what follows takes the rest
CURIOUS = 0.3  # of it (between steps: of `hang_s`), after which a rank asks the others
SILENT_S, SILENT = 4.0, 0.5  # a rank that does not answer for so long, or so much of `hang_s`, is given up, also in a long phase
POLL_S = 0.5
TELL_S = 1.0  # between two questions

STARTING, STEP = "starting", "step"
_COLLECTIVE_FILES = ("distributed_c10d.py", "deepspeed/comm/", "torch/distributed/")


@dataclass(frozen=True)
class Where:
    """What one rank tells of itself when asked."""

    step: int
    phase: str
    place: str  # the function and line that its training thread is in
    collective: bool


class Watchdog:
    """Training tells it of each step and longer phase; the thread does the rest. `on_hang` is called in that thread."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        log_folder: Path,
        *,
        hang_s: float,
        long_phase_s: float,
        on_hang: Callable[[HangError], None],
    ) -> None:
        self._rank, self._world_size, self._logs = rank, world_size, log_folder
        self._hang_s, self._long_phase_s = hang_s, long_phase_s
        self._on_hang = on_hang
        self._thread_id = threading.get_ident()  # of the training thread, which makes us
        self._lock = threading.Lock()
        self._step, self._phase, self._since_s = 0, STARTING, time.monotonic()
        self._rows = 1  # of the step
        self._steps: deque[tuple[float, int]] = deque(maxlen=STEPS_KEPT)  # how long each took, and how many rows it had
        self._store: Any = None
        self._warm = self._curious = False
        self._reached_s = time.monotonic()  # the store, last
        self._answered = 0  # the number of the last question answered here
        self._asked: dict[int, float] = {}  # own questions since training stands still: number -> when
        self._told: dict[int, tuple[int, Where]] = {}  # by rank: the number of its last answer, and where it was
        self._closed = threading.Event()

    def start(self, address: str, port: int) -> None:
        """Connects to the group's store; call it once torch.distributed is initialized."""
        from torch.distributed import TCPStore

        self._store = TCPStore(address, port, is_master=False, wait_for_workers=False)
        for target in (self._watch, self._talk):
            threading.Thread(target=target, name="watchdog", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def begin_step(self, step: int, rows: int = 1) -> None:
        """Training begins to work on `step`, of so many rows; the first two of a process are given `long_phase_s`."""
        with self._lock:
            self._step, self._rows, self._since_s = step, rows, time.monotonic()
            self._phase = STEP if self._steps else "first steps"

    def end_step(self) -> None:
        """What follows is still the step, as on a GPU its numbers may not be there yet, until a phase or the next step begins."""
        with self._lock:
            if self._warm:  # the first compiles, and fills pools of memory: it says nothing of the others
                self._steps.append((time.monotonic() - self._since_s, self._rows))
            self._warm = True

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part that has `long_phase_s`: a wait for data, an evaluation, a save, an export."""
        with self._lock:
            before, self._phase, self._since_s = self._phase, name, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._phase, self._since_s = before, time.monotonic()

    def allowed_s(self) -> float:
        """How long what this rank is doing may take."""
        if self._phase != STEP:
            return self._long_phase_s
        # A batch that has grown takes longer by as much, at most.
        usual_s = sorted(step_s * max(1.0, self._rows / rows) for step_s, rows in self._steps)
        slowest = usual_s[math.ceil(len(usual_s) * 0.99) - 1]
        return max(self._hang_s, HANG_STEPS * slowest)

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            with self._lock:
                silent_s, allowed_s, phase = time.monotonic() - self._since_s, self.allowed_s(), self._phase
            self._curious = silent_s > CURIOUS * (allowed_s if phase == STEP else self._hang_s)
            if not self._curious:
                continue
            hangs = silent_s > MARGIN * allowed_s
            patience_s = TELL_S + POLL_S if hangs else max(SILENT_S, SILENT * self._hang_s)
            if time.monotonic() - self._reached_s > patience_s + 2 * POLL_S:
                self._end("rank 0 does not answer: its process, which the ranks tell each other through, is stopped or gone")
            elif silent := [rank for rank in range(self._world_size) if rank != self._rank and self._unanswered_s(rank) > patience_s]:
                self._end(_ranks(silent) + " does not answer: its process is stopped or starved")
            elif hangs:
                self._end(self._missing({rank: where for rank, (_, where) in self._told.items()}))

    def _talk(self) -> None:
        """Answers who asks; while this rank is curious, asks too. A thread of its own: the store's calls wait for ever where rank 0, which
        holds it, is stopped."""
        while not self._closed.wait(POLL_S):
            with suppress(Exception):  # the store is gone: `_watch` sees that it is not reached
                self._ask_and_answer()
                self._reached_s = time.monotonic()

    def _ask_and_answer(self) -> None:
        store, now_s = self._store, time.monotonic()
        if not self._curious:
            self._asked.clear()
        elif now_s - max(self._asked.values(), default=0.0) >= TELL_S:
            self._asked[store.add("hang/asked", 1)] = now_s
        number = store.add("hang/asked", 0)
        if number > self._answered:
            self._answered, where = number, self._where()
            store.set(f"hang/where/{self._rank}", json.dumps([number, where.step, where.phase, where.place, where.collective]))
        for rank in range(self._world_size) if self._curious else ():
            if store.check([f"hang/where/{rank}"]):
                answer = json.loads(store.get(f"hang/where/{rank}"))
                self._told[rank] = answer[0], Where(*answer[1:])

    def _unanswered_s(self, rank: int) -> float:
        """How long ago the first question was put that the rank has not answered."""
        answered, now_s = self._told.get(rank, (0, None))[0], time.monotonic()
        return now_s - min((at_s for number, at_s in list(self._asked.items()) if number > answered), default=now_s)

    def _where(self) -> Where:
        place, collective = _place(sys._current_frames().get(self._thread_id))
        with self._lock:
            return Where(self._step, self._phase, place, collective)

    def _missing(self, told: dict[int, Where]) -> str:
        """Which ranks the others wait for, and where they are: those a step behind, else those outside a collective."""
        last = min((where.step for where in told.values()), default=0)
        behind = {rank: where for rank, where in told.items() if where.step == last}
        if len(behind) == len(told):
            behind = {rank: where for rank, where in told.items() if not where.collective}
        if not behind or len(behind) == len(told):
            where = self._where()
            return f"no rank stands out: all are in step {where.step} ({where.phase}, {where.place})"
        places = "; ".join(f"rank {rank} is in {where.place} ({where.phase}, step {where.step})" for rank, where in behind.items())
        return f"{_ranks(list(behind))} did not arrive where the others wait: {places}"

    def _end(self, why: str) -> None:
        with self._lock:
            silent_s, step, phase = time.monotonic() - self._since_s, self._step, self._phase
        path = self._dump()
        error = HangError(f"no progress for {silent_s:.0f} s in step {step} ({phase}): {why}. Stacks: {path}")
        self._closed.set()
        self._on_hang(error)

    def _dump(self) -> Path:
        """All threads' stacks, beside the run, or on this machine where that cannot be written."""
        path = self._logs / f"hang-rank-{self._rank:05d}.txt"
        try:
            with path.open("a") as file:
                file.write(f"--- rank {self._rank}, pid {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        return path


class Unwatched:
    """For training that nobody watches."""

    def begin_step(self, step: int, rows: int = 1) -> None: ...
    def end_step(self) -> None: ...
    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


def exit_at_once(error: HangError) -> None:
    """For a process that has nobody to tell."""
    print(f"watchdog: {error}", file=sys.stderr, flush=True)
    os._exit(HANG_EXIT_CODE)


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost function of a thread that is ours or a collective's, as "all_reduce (distributed_c10d.py:2900)"."""
    inside = False
    place = "no Python code"
    found = False
    while frame is not None:
        name = frame.f_code.co_filename
        inside = inside or any(part in name for part in _COLLECTIVE_FILES)
        if not found and "/contextlib.py" not in name and "c10d_logger" not in name:
            place, found = f"{frame.f_code.co_name} ({Path(name).name}:{frame.f_lineno})", True
        frame = frame.f_back
    return place, inside


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
