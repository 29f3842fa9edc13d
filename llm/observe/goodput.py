"""Where a run's time went: useful steps, and what was lost to what. From the rows of all its lives, restarts and commands included.

The clock runs while a command does: the time between two commands is nobody's, and not counted. Within a command every second belongs to
exactly one part; what no row accounts for is `other`.

Example: a command runs 100 s. Its loop begins after 10 s (start-up), makes 40 s of steps of which 2 s waited for data, and a worker dies.
The next loop begins 15 s after the last row (down time) from a checkpoint 5 s of steps back (redone), and makes the steps of 35 s more:
68 s of 100 were useful.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llm.metrics import Row

# In reading order; the first is what the run is for.
PARTS = ("useful", "start-up", "data wait", "save stall", "redone steps", "down time", "evaluation", "export", "other")


@dataclass(frozen=True)
class Goodput:
    """Seconds by part of PARTS; they add up to `wall_s`. `worker_s`: that time once for each worker that there was, which is what a run
    costs."""

    wall_s: float
    parts_s: dict[str, float]
    worker_s: float = 0.0

    @property
    def useful_frac(self) -> float:
        return self.parts_s["useful"] / self.wall_s if self.wall_s > 0 else 0.0


def goodput(rows: Iterable[Row]) -> Goodput:
    """Of the rows of metrics.jsonl, in their order in the file."""
    so_far = GoodputSoFar()
    for row in rows:
        so_far.add(row)
    return so_far.total()


class GoodputSoFar:
    """The same of a run that goes on, row by row. Steps that a restart does again may be among the rows: they are taken back then.

    `workers`: how many there are until a "start" event tells; where 0, time before it is reckoned with that event's number.
    """

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers
        self._parts: dict[str, float] = {**dict.fromkeys(PARTS, 0.0)}
        self._of_steps: list[tuple[int, str, float]] = []  # step, part, seconds: what a restart can take back
        self._began_at_s: float | None = None
        self._commands_s = 0.0  # of the commands before this one
        self._command_s = 0.0
        self._loops = 0  # of this command
        self._before_loop_s = 0.0  # on the command's clock: where the start-up or the down time that comes next begins
        self._worker_s = 0.0
        self._unknown_s = 0.0  # time with workers whose number is not known yet

    def begin_command(self, at_s: float) -> None:
        """A command begins at Unix time `at_s`. Its rows tell that too, once there are any."""
        self._commands_s += self._command_s
        self._command_s, self._before_loop_s, self._loops = 0.0, 0.0, 0
        self._began_at_s = at_s

    def add(self, row: Row) -> None:
        self._notice_new_command(row)
        kind, event = row["kind"], row.get("event")
        if event == "start":
            self.workers = row.get("workers", self.workers)
        if (elapsed_s := row.get("elapsed_s")) is not None and elapsed_s > self._command_s:
            self._unknown_s += elapsed_s - self._command_s
            self._command_s = elapsed_s
        if self.workers:
            self._worker_s += self._unknown_s * self.workers
            self._unknown_s = 0.0
        if kind == "step":
            waited_s = row["step_s"] * (row.get("data_wait_frac") or 0.0)
            self._spend_on(row["step"], "data wait", waited_s)
            self._spend_on(row["step"], "useful", row["step_s"] - waited_s)
        elif kind == "eval":
            self._spend_on(row["step"], "evaluation", row.get("eval_s") or 0.0)
        elif event == "restart":
            self._take_back(row)
            self._parts["redone steps"] += row.get("redone_s") or 0.0
            if row.get("down_s") is not None:
                self._before_loop_s = row["elapsed_s"] - row["down_s"]
        elif event == "start":
            self._parts["start-up" if self._loops == 0 else "down time"] += row["elapsed_s"] - self._before_loop_s
            self._loops += 1
        elif event == "checkpoint":
            self._parts["save stall"] += row.get("stall_s", row.get("took_s")) or 0.0
        elif event == "export":
            self._parts["export"] += row.get("took_s") or 0.0

    def total(self, elapsed_s: float = 0.0) -> Goodput:
        """All so far; with `elapsed_s`, up to that time on the last command's clock, which no row may have told of yet."""
        since_s = max(0.0, elapsed_s - self._command_s)
        wall_s = self._commands_s + self._command_s + since_s
        parts = dict(self._parts)
        parts["other"] = max(0.0, wall_s - sum(parts.values()))
        return Goodput(wall_s, parts, self._worker_s + since_s * self.workers)

    def _notice_new_command(self, row: Row) -> None:
        """An event's time of writing less its time since the command began is when that was."""
        written_s, elapsed_s = row.get("written_at_s"), row.get("elapsed_s")
        if row["kind"] == "event" and written_s is not None and elapsed_s is not None:
            began_at_s = written_s - elapsed_s
            if self._began_at_s is None:
                self._began_at_s = began_at_s
            elif abs(began_at_s - self._began_at_s) > 1:
                self.begin_command(began_at_s)

    def _spend_on(self, step: int, part: str, seconds: float) -> None:
        self._parts[part] += seconds
        self._of_steps.append((step, part, seconds))

    def _take_back(self, restart: Row) -> None:
        while self._of_steps and self._of_steps[-1][0] > restart.get("step", self._of_steps[-1][0]):
            _, part, seconds = self._of_steps.pop()
            self._parts[part] -= seconds
