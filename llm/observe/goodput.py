"""Where a run's time went: useful steps, and what was lost to what. From the rows of all its lives, restarts and commands included.

The clock runs while a command does: the time between two commands is nobody's, and not counted. Within a command every second belongs to
exactly one part; what no row accounts for is `other`.

Example: a command runs 100 s. Its loop begins after 10 s (start-up), makes 40 s of steps of which 2 s waited for data, and a worker dies.
The next loop begins 15 s after the last row (down time) from a checkpoint 5 s of steps back (redone), and makes the steps of 35 s more:
68 s of 100 were useful.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm.metrics import Row

# In reading order; the first is what the run is for.
PARTS = ("useful", "start-up", "data wait", "save stall", "redone steps", "down time", "evaluation", "export", "other")


@dataclass(frozen=True)
class Goodput:
    """Seconds by part of PARTS; they add up to `wall_s`."""

    wall_s: float
    parts_s: dict[str, float]

    @property
    def useful_frac(self) -> float:
        return self.parts_s["useful"] / self.wall_s if self.wall_s > 0 else 0.0


def goodput(rows: Sequence[Row]) -> Goodput:
    """Of the rows of metrics.jsonl, in their order in the file."""
    parts: dict[str, float] = {**dict.fromkeys(PARTS, 0.0)}
    for command in _commands(rows):
        loops = 0
        before_loop_s = 0.0  # on the command's clock: where the start-up or the down time that comes next begins
        for row in command:
            kind, event = row["kind"], row.get("event")
            if kind == "step":
                waited_s = row["step_s"] * (row.get("data_wait_frac") or 0.0)
                parts["data wait"] += waited_s
                parts["useful"] += row["step_s"] - waited_s
            elif kind == "eval":
                parts["evaluation"] += row.get("eval_s") or 0.0
            elif event == "restart":
                parts["redone steps"] += row.get("redone_s") or 0.0
                if row.get("down_s") is not None:
                    before_loop_s = row["elapsed_s"] - row["down_s"]
            elif event == "start":
                parts["start-up" if loops == 0 else "down time"] += row["elapsed_s"] - before_loop_s
                loops += 1
            elif event == "checkpoint":
                parts["save stall"] += row.get("stall_s", row.get("took_s")) or 0.0
            elif event == "export":
                parts["export"] += row.get("took_s") or 0.0
    last_s = (max((row["elapsed_s"] for row in command if row.get("elapsed_s") is not None), default=0.0) for command in _commands(rows))
    wall_s = sum(last_s)
    parts["other"] = max(0.0, wall_s - sum(parts.values()))
    return Goodput(wall_s, parts)


def _commands(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each command: an event's time of writing less its time since the command began is when that was."""
    found: list[list[Row]] = []
    began_at_s: float | None = None
    for row in rows:
        written_s, elapsed_s = row.get("written_at_s"), row.get("elapsed_s")
        if row["kind"] == "event" and written_s is not None and elapsed_s is not None:
            this_began_at_s = written_s - elapsed_s
            if began_at_s is None or abs(this_began_at_s - began_at_s) > 1:
                if began_at_s is not None or not found:
                    found.append([])
                began_at_s = this_began_at_s
        if not found:
            found.append([])
        found[-1].append(row)
    return found
