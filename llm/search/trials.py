"""The trials of a sweep and what is known of each: settings, loss curve, how it ended. Kept in `<sweep>/sweep.jsonl`, so that the same
command goes on where a sweep was cut.

    {"kind": "sweep", "made_of": {...}}                                             what the sweep is; another one is refused
    {"kind": "trial", "trial": 3, "settings": {"train.lr": 0.0031}, "repeat": 0}
    {"kind": "end", "trial": 3, "status": "stopped", "cause": "", "took_s": 41.2}   no such row: it is to go on
    {"kind": "promoted", "trial": 3}                                                it goes on to the next rung
    {"kind": "generation", "step": 40, "takeovers": [{"trial": 3, "of": 1, "run": "0001", "settings": {...}}]}   of a population

Losses are not in it: each trial's own metrics.jsonl has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm.config import RunConfig, S3Section
from llm.config_changes import ABSENT, leaves, told
from llm.errors import ConfigError
from llm.metrics import MetricsTail, Row, rows_of
from llm.observe.goodput import goodput
from llm.storage import join, read_bytes_or_none, write_bytes

FINISHED, STOPPED, FAILED, RUNNING = "finished", "stopped", "failed", "running"
METRICS = "metrics.jsonl"
CHANGES_SHOWN = 10
PAUSED = "paused"  # how a run ends that is to go on: of no trial


@dataclass(frozen=True)
class Point:
    """An evaluation: after `step` updates and `tokens` tokens, the loss in nats per token."""

    step: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Takeover:
    """Trial `trial` goes on with new settings from the checkpoint of `step` that the run `run` of trial `of` has."""

    trial: int
    step: int
    of: int
    run: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """`settings`: those that it trains with now, or last."""

    number: int
    settings: Mapping[str, Any]
    repeat: int = 0
    status: str = RUNNING
    cause: str = ""  # of a failure
    took_s: float = 0.0
    curve: tuple[Point, ...] = field(default=())
    takeovers: tuple[Takeover, ...] = ()
    rung: int = 0  # of those at which the scheduler lets it pause, the one that it trains to or has come to

    @property
    def run_name(self) -> str:
        """Its run's folder. After a takeover it is another run."""
        return self.run_names[-1]

    @property
    def run_names(self) -> tuple[str, ...]:
        """The folders of all its runs, oldest first."""
        return f"{self.number:04d}", *(f"{self.number:04d}-{n}" for n in range(1, len(self.takeovers) + 1))

    @property
    def loss(self) -> float:
        """The last evaluation's; infinite before the first."""
        return self.curve[-1].loss if self.curve else math.inf

    def loss_at(self, tokens: int) -> float:
        """The first evaluation's after at least so many tokens; infinite before it."""
        return next((point.loss for point in self.curve if point.tokens >= tokens), math.inf)

    @property
    def tokens(self) -> int:
        return self.curve[-1].tokens if self.curve else 0


class Journal:
    """The driver's: every change is durable when it returns."""

    def __init__(self, sweep_uri: str, s3: S3Section, made_of: Mapping[str, Any]) -> None:
        """Raises ConfigError where another sweep is kept there."""
        self._uri, self._s3 = join(sweep_uri, "sweep.jsonl"), s3
        data = read_bytes_or_none(self._uri, s3) or b""
        self.trials: dict[int, Trial] = {}
        try:
            self._lines = [line for line in data.decode().splitlines() if line]
            rows = [json.loads(line) for line in self._lines]
            before = dict(rows[0]["made_of"]) if rows else made_of
            for row in rows[1:]:
                self._take(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{self._uri} is no sweep's record ({type(error).__name__}: {error}). Choose another sweep.name.") from None
        _require_same(sweep_uri, before, json.loads(json.dumps(made_of)))
        if not rows:
            self._add({"kind": "sweep", "made_of": made_of})

    def begin(self, number: int, settings: Mapping[str, Any], repeat: int) -> Trial:
        self._add({"kind": "trial", "trial": number, "settings": dict(settings), "repeat": repeat})
        return self.trials[number]

    def end(self, number: int, status: str, cause: str = "") -> None:
        self._add({"kind": "end", "trial": number, "status": status, "cause": cause[:1000], "took_s": round(self.trials[number].took_s, 1)})

    def promote(self, number: int) -> None:
        self._add({"kind": "promoted", "trial": number})

    def generation(self, step: int, takeovers: Sequence[Takeover]) -> None:
        """A generation of a population has ended at that step, with these takeovers."""
        told = [{"trial": each.trial, "of": each.of, "run": each.run, "settings": dict(each.settings)} for each in takeovers]
        self._add({"kind": "generation", "step": step, "takeovers": told})

    def learn(self, number: int, point: Point | None, took_s: float) -> None:
        """What a running trial has shown; its own metrics keep it. One that goes on tells what it had shown before once more."""
        trial = self.trials[number]
        curve = (*(each for each in trial.curve if each.step < point.step), point) if point else trial.curve
        self.trials[number] = replace(trial, curve=curve, took_s=took_s)

    def _add(self, row: dict[str, Any]) -> None:
        self._take(row)
        self._lines.append(json.dumps(row))
        write_bytes(self._uri, ("\n".join(self._lines) + "\n").encode(), self._s3)

    def _take(self, row: Mapping[str, Any]) -> None:
        if row["kind"] == "trial":
            self.trials[row["trial"]] = Trial(row["trial"], row["settings"], row["repeat"])
        elif row["kind"] == "promoted":
            self._next_rung(self.trials[row["trial"]])
        elif row["kind"] == "generation":
            for trial in [trial for trial in self.trials.values() if trial.status == RUNNING]:
                self._next_rung(trial)
            for told in row["takeovers"]:
                takeover, trial = Takeover(step=row["step"], **told), self.trials[told["trial"]]
                self.trials[trial.number] = replace(trial, settings=takeover.settings, takeovers=(*trial.takeovers, takeover))
        elif row["kind"] == "end":
            ended = {name: row[name] for name in ("status", "cause", "took_s")}
            self.trials[row["trial"]] = replace(self.trials[row["trial"]], **ended)

    def _next_rung(self, trial: Trial) -> None:
        self.trials[trial.number] = replace(trial, rung=trial.rung + 1)


def tokens_after(config: RunConfig, step: int) -> int:
    """Tokens of the batches of the first `step` steps, padding counted: the measure by which trials of other batch sizes are compared."""
    return config.train.rows_before(step) * config.data.seq_len


def curve_of(metrics: bytes, config: RunConfig) -> tuple[Point, ...]:
    """The evaluations in a trial's metrics.jsonl, in order; of one that was done again after a restart, the last."""
    found = {
        row["step"]: Point(row["step"], tokens_after(config, row["step"]), math.inf if row["eval_loss"] is None else row["eval_loss"])
        for row in rows_of(_rows(metrics), "eval")
        if row["step"]
    }
    return tuple(found[step] for step in sorted(found))


def took_s_of(metrics: bytes) -> float:
    """Seconds that the run of a metrics.jsonl has taken, in all its commands."""
    return goodput(_rows(metrics)).wall_s


def _rows(metrics: bytes) -> list[Row]:
    return MetricsTail(lambda offset: metrics[offset:]).poll()


def at_most_tokens(trials: Collection[Trial], least: int) -> dict[int, float]:
    """Losses, by trial, after the most tokens at which at least so many trials have been evaluated; empty where none are."""
    at: dict[int, dict[int, float]] = {}
    for trial in trials:
        for point in trial.curve:
            if math.isfinite(point.loss) and trial.status != FAILED:
                at.setdefault(point.tokens, {})[trial.number] = point.loss
    enough = [tokens for tokens, losses in at.items() if len(losses) >= least]
    return at[max(enough)] if enough else {}


def best_of(trials: Mapping[int, Trial]) -> Trial | None:
    """Of those that came furthest, the one of the least loss; of several seeds of a setting, the best of the best mean."""
    seen = [trial for trial in trials.values() if trial.curve and trial.status != FAILED and math.isfinite(trial.loss)]
    finished = [trial for trial in seen if trial.status == FINISHED]
    of_setting: dict[str, list[Trial]] = {}
    for trial in finished or seen:
        of_setting.setdefault(json.dumps(trial.settings, sort_keys=True), []).append(trial)
    means = [(sum(t.loss for t in group) / len(group), min(group, key=lambda t: (t.loss, t.number))) for group in of_setting.values()]
    return min(means, key=lambda pair: (pair[0], pair[1].number))[1] if means else None


def _require_same(uri: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if isinstance(before.get("run"), str):
        raise ConfigError(f"the sweep in {uri} is an earlier version's, which recorded its run as a text. Choose another sweep.name.")
    old, new = dict(leaves(before, "")), dict(leaves(now, ""))
    keys = [key for key in {**old, **new} if old.get(key, ABSENT) != new.get(key, ABSENT)]
    if keys:
        changed = "\n".join(f"  {key}: {told(old.get(key, ABSENT))} -> {told(new.get(key, ABSENT))}" for key in keys[:CHANGES_SHOWN])
        changed += f"\n  and {len(keys) - CHANGES_SHOWN} more" if len(keys) > CHANGES_SHOWN else ""
        raise ConfigError(
            f"the sweep in {uri} was started otherwise:\n{changed}\n  Set the values back to go on with it, or choose another sweep.name."
        )
