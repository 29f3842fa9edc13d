"""Which trial comes next, and when a sweep has had enough. The driver's; Ray Tune asks it through `llm/search/tuner.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from llm.config import RunConfig
from llm.errors import ConfigError
from llm.search.sweep_config import Sweep
from llm.search.trial import TrialRun
from llm.search.trials import FAILED, FINISHED, RUNNING, STOPPED, Journal, Point, Trial, curve_of
from llm.storage import join, read_bytes_or_none


class Searcher(Protocol):
    """What proposes settings. `told`: of trials that have ended, also those of earlier commands."""

    def propose(self, number: int) -> dict[str, Any] | None:
        """The settings of the `number`-th setting, from 0; None where there are no more."""
        ...

    def tell(self, settings: Mapping[str, Any], loss: float) -> None: ...


@dataclass(frozen=True)
class Spent:
    tokens: int
    hours: float
    dollars: float


class Study:
    """`show` is called after every change."""

    def __init__(self, sweep: Sweep, searcher: Searcher, command: tuple[str, ...], show: Callable[[Study], None]) -> None:
        file = sweep.file
        made_of = {
            "space": file.space,
            "search": file.search.model_dump(),
            "scheduler": file.scheduler.model_dump(),
            "seed": file.sweep.seed,
            "repeats": file.sweep.repeats,
            "run": sweep.base_text,
        }
        self.sweep, self._searcher, self._command, self._show = sweep, searcher, command, show
        self.journal = Journal(sweep.uri, sweep.base.s3, made_of)
        self.configs: dict[int, RunConfig] = {}
        for trial in list(self.trials.values()):
            self._read_again(trial)
        self._to_begin = [trial.number for trial in self.trials.values() if trial.status != FAILED]
        self._settings = 1 + max((self._setting_of(trial) for trial in self.trials.values()), default=-1)
        self._repeats_left: list[tuple[dict[str, Any], int]] = self._unrepeated()
        self.cut = ""  # which budget ended the sweep

    def __reduce__(self) -> tuple[type, tuple[str]]:
        """Tune keeps copies of all that it is given, for a restore that is not used here: a study stays where it is."""
        return str, ("a study",)

    @property
    def trials(self) -> dict[int, Trial]:
        return self.journal.trials

    def next(self) -> TrialRun | None:
        """The next trial to begin: those of an earlier command first, in their order, then new ones; None where the budget ends."""
        if self._to_begin:
            return self._run_of(self.trials[self._to_begin.pop(0)])
        while not self.budget_used():
            if not self._repeats_left:
                if self._settings >= self.sweep.file.budget.trials:
                    return None
                settings = self._searcher.propose(self._settings)
                if settings is None:
                    return None
                self._settings += 1
                self._repeats_left = [(settings, repeat) for repeat in range(self.sweep.file.sweep.repeats)]
            settings, repeat = self._repeats_left.pop(0)
            trial = self.journal.begin(len(self.trials), settings, repeat)
            try:
                return self._run_of(trial)
            except ConfigError as error:
                self.end(trial.number, FAILED, str(error).splitlines()[-1].strip(), 0.0)
        return None

    def learn(self, number: int, result: Mapping[str, Any]) -> None:
        """An evaluation of a trial that runs."""
        if self.trials[number].status == RUNNING and "eval_loss" in result:
            self.journal.learn(number, Point(result["step"], result["tokens"], result["eval_loss"]), result["took_s"])
            self._show(self)

    def end(self, number: int, status: str, cause: str, took_s: float) -> None:
        """A trial's end; known once, whatever is said of it later."""
        if self.trials[number].status != RUNNING:
            return
        if status == STOPPED and self.cut:
            return  # not the scheduler's decision: with more budget it goes on
        self.journal.end(number, status, cause, took_s)
        trial = self.trials[number]
        if status != FAILED and math.isfinite(trial.loss):
            self._searcher.tell(trial.settings, trial.loss)
        self._show(self)

    def spent(self) -> Spent:
        budget = self.sweep.file.budget
        worker_hours = (
            sum(t.took_s * self.configs[t.number].parallel.workers for t in self.trials.values() if t.number in self.configs) / 3600
        )
        return Spent(
            sum(trial.tokens for trial in self.trials.values()),
            sum(trial.took_s for trial in self.trials.values()) / 3600,
            worker_hours * (budget.dollars_per_worker_hour or 0.0),
        )

    def budget_used(self) -> bool:
        """Whether tokens, hours or dollars are used up; `cut` says which."""
        budget, spent = self.sweep.file.budget, self.spent()
        for name in ("tokens", "hours", "dollars"):
            limit = getattr(budget, name)
            if limit is not None and getattr(spent, name) >= limit:
                self.cut = f"budget.{name}={limit:g}"
        return bool(self.cut)

    def _run_of(self, trial: Trial) -> TrialRun:
        from llm.config_file import dump_run

        config = self.configs.get(trial.number) or self._config_of(trial)
        self.configs[trial.number] = config
        return TrialRun(
            trial.number,
            join(config.run.storage, config.run.name),
            dump_run(config),
            self._command,
            str(Path.cwd()),
            "" if trial.status == RUNNING else trial.status,
        )

    def _config_of(self, trial: Trial) -> RunConfig:
        config = self.sweep.trial(trial.number, dict(trial.settings))
        return config.model_copy(update={"run": config.run.model_copy(update={"seed": config.run.seed + trial.repeat})})

    def _read_again(self, trial: Trial) -> None:
        """What a trial of an earlier command had come to."""
        try:
            config = self.configs[trial.number] = self._config_of(trial)
        except ConfigError:
            return  # it has failed by this
        self.journal.trials[trial.number] = replace(trial, curve=self._curve(trial, config))
        if trial.status in (FINISHED, STOPPED):
            self._searcher.tell(trial.settings, self.trials[trial.number].loss)

    def _curve(self, trial: Trial, config: RunConfig) -> tuple[Any, ...]:
        data = read_bytes_or_none(join(config.run.storage, config.run.name, "metrics.jsonl"), config.s3) or b""
        return curve_of(data, config)

    def _setting_of(self, trial: Trial) -> int:
        return trial.number // self.sweep.file.sweep.repeats

    def _unrepeated(self) -> list[tuple[dict[str, Any], int]]:
        """The repeats of the last setting that were not begun."""
        last = max(self.trials.values(), key=lambda trial: trial.number, default=None)
        if last is None:
            return []
        return [(dict(last.settings), repeat) for repeat in range(last.repeat + 1, self.sweep.file.sweep.repeats)]
