"""What a run shows of itself while it goes on: the numbers for a monitoring system, and their values from the rows so far.

Pure: `llm/train/ray_metrics.py` hands them to Ray, whose metrics agents put "ray_" before each name (and "_total" behind a counter's), and
`infra/monitoring` has what watches them. Labels hold the run's name and causes of restarts: nothing of its configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llm.metrics import Row
from llm.observe.goodput import GoodputSoFar
from llm.observe.summary import dollars, dollars_per_mtok

RUN_LABEL, CAUSE_LABEL = "run", "cause"


@dataclass(frozen=True)
class Exported:
    """One number that is shown. `about`: its unit and what it is."""

    name: str
    kind: Literal["gauge", "counter"]
    about: str
    labels: tuple[str, ...] = (RUN_LABEL,)

    @property
    def prometheus_name(self) -> str:
        """As Prometheus has it from Ray."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


EXPORTED: dict[str, Exported] = {
    exported.name: exported
    for exported in (
        Exported("headrace_step", "gauge", "optimizer steps done: the last one's number"),
        Exported("headrace_total_steps", "gauge", "optimizer steps that the run is to make"),
        Exported("headrace_loss", "gauge", "nats per token: the last step's training loss"),
        Exported("headrace_eval_loss", "gauge", "nats per token: the last evaluation's loss"),
        Exported("headrace_tokens_per_s", "gauge", "tokens/s of the last steps, all data ranks"),
        Exported("headrace_mfu", "gauge", "fraction of peak: model FLOPs over what the devices could do, of the last steps"),
        Exported("headrace_data_wait_frac", "gauge", "fraction of the last steps' time in which rank 0 waited for data"),
        Exported("headrace_goodput", "gauge", "fraction of the time since the run's first command began that went into steps that count"),
        Exported("headrace_workers", "gauge", "workers of the group that trains, or trained last"),
        Exported("headrace_last_progress_at_s", "gauge", "Unix time at which a step was made that no one had made before; at first, now"),
        Exported("headrace_dollars_per_mtok", "gauge", "dollars for a million tokens of the run so far; needs log.dollars_per_worker_hour"),
        Exported("headrace_steps", "counter", "optimizer steps since this command began, done again ones included"),
        Exported("headrace_tokens", "counter", "tokens trained on since this command began, done again ones included"),
        Exported("headrace_restarts", "counter", "restarts from a checkpoint since this command began, by cause", (RUN_LABEL, CAUSE_LABEL)),
        Exported("headrace_spend_dollars", "counter", "dollars since this command began; needs log.dollars_per_worker_hour"),
    )
}


@dataclass(frozen=True)
class Reading:
    """`gauges`: name -> value. `counts`: (name, cause) -> what was added since the last reading; the cause is "" but for restarts."""

    gauges: Mapping[str, float]
    counts: Mapping[tuple[str, str], float]


class LiveRun:
    """The numbers of a run as its driver sees it: all rows of the file, and the clock, which goes on where no row comes any more."""

    def __init__(
        self, earlier: Sequence[Row], started_at_s: float, now_s: float, workers: int, dollars_per_worker_hour: float | None
    ) -> None:
        """`earlier`: the rows of commands before this one; `workers`: how many this one wants; times are Unix times."""
        self._started_at_s = started_at_s
        self._price = dollars_per_worker_hour
        self._gauges: dict[str, float] = {}
        self._tokens = 0
        self._furthest_step = 0
        self._so_far = GoodputSoFar()
        for row in earlier:
            self._so_far.add(row)
            if row["kind"] == "step":
                self._furthest_step, self._tokens = max(self._furthest_step, row["step"]), row["tokens"]
        self._so_far.workers = workers
        self._so_far.begin_command(started_at_s)
        self._spent = dollars(self._so_far.total().worker_s, self._price) or 0.0
        self._gauges["headrace_last_progress_at_s"] = now_s

    def read(self, rows: Iterable[Row], now_s: float) -> Reading:
        """The numbers at `now_s`, with the `rows` that came since the last reading."""
        counts: dict[tuple[str, str], float] = {}
        steps = []
        for row in rows:
            self._so_far.add(row)
            if row["kind"] == "step":
                steps.append(row)
            elif row["kind"] == "eval":
                self._show("headrace_eval_loss", row.get("eval_loss"))
            elif row.get("event") == "restart":
                key = ("headrace_restarts", str(row.get("cause") or "unknown"))
                counts[key] = counts.get(key, 0) + 1
            elif row.get("event") == "start":
                self._show("headrace_total_steps", row.get("total_steps"))
        if steps:
            counts |= self._learn(steps, now_s)
        total = self._so_far.total(now_s - self._started_at_s)
        self._show("headrace_goodput", total.useful_frac)
        self._show("headrace_workers", self._so_far.workers)
        spent = dollars(total.worker_s, self._price)
        self._show("headrace_dollars_per_mtok", dollars_per_mtok(spent, self._tokens))
        if spent is not None and spent > self._spent:
            counts["headrace_spend_dollars", ""] = spent - self._spent
            self._spent = spent
        return Reading(dict(self._gauges), counts)

    def _learn(self, steps: Sequence[Row], now_s: float) -> dict[tuple[str, str], float]:
        last = steps[-1]
        self._tokens = last["tokens"]
        self._show("headrace_step", last["step"])
        self._show("headrace_loss", next((row["loss"] for row in reversed(steps) if row["loss"] is not None), None))
        for name in ("tokens_per_s", "mfu", "data_wait_frac"):
            known = [(row[name], row["step_s"]) for row in steps if row.get(name) is not None]
            time_s = sum(step_s for _, step_s in known)
            self._show(f"headrace_{name}", sum(value * step_s for value, step_s in known) / time_s if time_s > 0 else None)
        furthest = max(row["step"] for row in steps)
        if furthest > self._furthest_step:
            self._furthest_step = furthest
            self._gauges["headrace_last_progress_at_s"] = now_s
        tokens = sum(round((row["tokens_per_s"] or 0.0) * row["step_s"]) for row in steps)
        return {("headrace_steps", ""): len(steps), **({("headrace_tokens", ""): tokens} if tokens else {})}

    def _show(self, name: str, value: float | None) -> None:
        if value is not None:
            self._gauges[name] = float(value)
