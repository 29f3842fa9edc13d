"""Which trial comes next, and when a sweep has had enough. The driver's; Ray Tune asks it through `llm/search/tuner.py`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from llm.checkpoint.store import CheckpointStore
from llm.config import RunConfig
from llm.errors import ConfigError
from llm.observe.summary import dollars
from llm.search.population import Population
from llm.search.rungs import Rungs
from llm.search.sweep_config import Sweep
from llm.search.trial import TrialRun
from llm.search.trials import FAILED, FINISHED, METRICS, PAUSED, RUNNING, STOPPED, Journal, Point, Trial, curve_of, took_s_of
from llm.storage import join, read_bytes_or_none

FREE = ("log", "recovery", "s3")  # sections of the run by which no trial is another: a sweep that goes on may have others
# What proposes the settings of the n-th setting, from 0, given all trials so far; None where there are no more.
Searcher = Callable[[int, Collection[Trial]], dict[str, Any] | None]


@dataclass(frozen=True)
class Spent:
    tokens: int
    hours: float
    dollars: float


class Scheduler(Protocol):
    """What lets trials pause, and go on or not: by the others' losses."""

    def until_step(self, trial: Trial, config: RunConfig) -> int | None:
        """Where the trial pauses next; None where it trains to its end."""
        ...

    def go_on(self, journal: Journal, arrived: set[int], all_begun: bool) -> list[int]:
        """Those of the trials that have `arrived` that go on now, which the journal then says. `all_begun`: nothing runs, and no new trial
        will come."""
        ...


class ToTheEnd:
    """Of a search without a scheduler, and of one that Ray Tune stops."""

    def __init__(self, sweep: Sweep) -> None: ...

    def until_step(self, trial: Trial, config: RunConfig) -> int | None:
        return None

    def go_on(self, journal: Journal, arrived: set[int], all_begun: bool) -> list[int]:
        return []


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
            "run": {name: section for name, section in sweep.base.values().items() if name not in FREE},
        }
        self.sweep, self._searcher, self._command, self._show = sweep, searcher, command, show
        self._scheduler: Scheduler = {"asha": Rungs, "pbt": Population}.get(file.scheduler.kind, ToTheEnd)(sweep)
        self.journal = Journal(sweep.uri, sweep.base.s3, made_of)
        self.configs: dict[int, RunConfig] = {}
        self._earlier_s: dict[int, float] = {}  # by trial: what its runs before the last took
        for trial in list(self.trials.values()):
            self._read_again(trial)
        self.arrived = {trial.number for trial in self.trials.values() if self._has_arrived(trial)}  # they pause where the scheduler said
        # Tune's median rule must hear again what trials that have ended had shown.
        again = {RUNNING, FINISHED, STOPPED} if file.scheduler.kind == "median" else {RUNNING}
        self._to_begin = [n for n, trial in self.trials.items() if trial.status in again and n not in self.arrived]
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
        """The next trial to begin: those of an earlier command first, in their order, then what the scheduler lets go on, then new ones.
        None where there is none now."""
        run = self._begun_before() or self._goes_on(False) or self._proposed() or self._goes_on(True)
        if run is None and not self.waits and not self.cut:
            for number in sorted(self.arrived):
                self.end(number, STOPPED)
        if run is not None:
            self._show(self)
        return run

    @property
    def waits(self) -> bool:
        """Whether `next` may still give a trial after it gave none: it depends on those that run."""
        return not self.cut and any(trial.status == RUNNING for n, trial in self.trials.items() if n not in self.arrived)

    def _begun_before(self) -> TrialRun | None:
        while self._to_begin:
            if run := self._run_or_fail(self.trials[self._to_begin.pop(0)]):
                return run
        return None

    def _proposed(self) -> TrialRun | None:
        while not self.budget_used():
            if not self._repeats_left:
                if self._settings >= self.sweep.file.budget.trials:
                    return None
                settings = self._searcher(self._settings, self.trials.values())
                if settings is None:
                    return None
                self._settings += 1
                self._repeats_left = [(settings, repeat) for repeat in range(self.sweep.file.sweep.repeats)]
            settings, repeat = self._repeats_left.pop(0)
            if run := self._run_or_fail(self.journal.begin(len(self.trials), settings, repeat)):
                return run
        return None

    def _run_or_fail(self, trial: Trial) -> TrialRun | None:
        try:
            return self._run_of(trial)
        except ConfigError as error:
            self.end(trial.number, FAILED, str(error).splitlines()[-1].strip())
        return None

    def _goes_on(self, all_begun: bool) -> TrialRun | None:
        """A trial that goes on from where it paused. `all_begun`: no new one will come."""
        if self.budget_used():
            return None
        for number in self._scheduler.go_on(self.journal, self.arrived, all_begun and not self.waits):
            self.arrived.discard(number)
            self._to_begin.append(number)
            if self.trials[number].run_name != self.configs[number].run.name:  # it has taken over from another
                self._earlier_s[number] = self.trials[number].took_s
                del self.configs[number]
        return self._begun_before()

    def learn(self, number: int, result: Mapping[str, Any]) -> None:
        """What a trial that runs has reported: seconds that its run took, and an evaluation."""
        if self.trials[number].status == RUNNING:
            point = Point(result["step"], result["tokens"], result["eval_loss"]) if "eval_loss" in result else None
            self.journal.learn(number, point, self._earlier_s.get(number, 0.0) + result["took_s"])
            self._show(self)

    def end(self, number: int, status: str, cause: str = "") -> None:
        """A trial's end; known once, whatever is said of it later."""
        if self.trials[number].status != RUNNING:
            return
        if status == STOPPED and self.cut:
            return  # not the scheduler's decision: with more budget it goes on
        if status == PAUSED:
            self.arrived.add(number)
        else:
            self.arrived.discard(number)
            self.journal.end(number, status, cause)
        self._show(self)

    def status_of(self, trial: Trial) -> str:
        """As a person reads it: of those that have not ended, why they do not run now."""
        if trial.status != RUNNING:
            return trial.status
        return "paused" if trial.number in self.arrived else "cut by the budget" if self.cut else RUNNING

    def spent(self) -> Spent:
        trials = self.trials.values()
        worker_s = sum(t.took_s * self.configs[t.number].parallel.workers for t in trials if t.number in self.configs)
        return Spent(
            sum(trial.tokens for trial in trials),
            sum(trial.took_s for trial in trials) / 3600,
            dollars(worker_s, self.sweep.base.log.dollars_per_worker_hour) or 0.0,
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

        if trial.number not in self.configs:
            self.configs[trial.number] = self.sweep.trial(trial)
        config = self.configs[trial.number]
        if trial.status == RUNNING:
            until = self._scheduler.until_step(trial, config)
            config = config.model_copy(update={"train": config.train.model_copy(update={"until_step": until})})
        return TrialRun(
            trial.number,
            join(config.run.storage, config.run.name),
            dump_run(config),
            self._command,
            str(Path.cwd()),
            "" if trial.status == RUNNING else trial.status,
        )

    def _read_again(self, trial: Trial) -> None:
        """What a trial of an earlier command had come to."""
        try:
            config = self.configs[trial.number] = self.sweep.trial(trial)
        except ConfigError:
            return  # it has failed by this
        curve, took_s = (), []
        for number, name in enumerate(trial.run_names):
            data = read_bytes_or_none(join(config.run.storage, name, METRICS), config.s3) or b""
            until = trial.takeovers[number].step if number < len(trial.takeovers) else config.train.steps
            curve += tuple(point for point in curve_of(data, config) if point.step <= until)
            took_s.append(took_s_of(data))
        self._earlier_s[trial.number] = sum(took_s[:-1])
        took = sum(took_s) if trial.status == RUNNING else trial.took_s
        self.journal.trials[trial.number] = replace(trial, curve=curve, took_s=took)

    def _has_arrived(self, trial: Trial) -> bool:
        """Whether a trial of an earlier command has come to where it was to pause, its checkpoint there to go on from."""
        config = self.configs.get(trial.number)
        if config is None or trial.status != RUNNING or (until := self._scheduler.until_step(trial, config)) is None:
            return False
        return until in CheckpointStore(join(config.run.storage, config.run.name), config.s3).steps()

    def _setting_of(self, trial: Trial) -> int:
        return trial.number // self.sweep.file.sweep.repeats

    def _unrepeated(self) -> list[tuple[dict[str, Any], int]]:
        """The repeats of the last setting that were not begun."""
        last = max(self.trials.values(), key=lambda trial: trial.number, default=None)
        if last is None:
            return []
        return [(dict(last.settings), repeat) for repeat in range(last.repeat + 1, self.sweep.file.sweep.repeats)]
