"""What a sweep is: a file that names a run, the space around it, a searcher, a scheduler and a budget.

    sweep:     {name: lr_and_width, seed: 0}
    run:       run.yaml                    # beside this file; what every trial is but for the space
    set:       {train.steps: 400}          # laid over it, as --set
    space:     {train.lr: {loguniform: [1.0e-4, 1.0e-2]}, model.config.hidden_size: {choice: [64, 128]}}
    search:    {searcher: random}
    scheduler: {kind: asha, first_frac: 0.11, reduction: 3}
    budget:    {trials: 8}

The trials are runs in `<run.storage>/<sweep.name>/trials/`, which share the run's token cache.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from llm.checkpoint.layout import step_folder
from llm.config import NAME, RunConfig
from llm.config_changes import is_below
from llm.config_file import dump_run, parse_run, read_mapping, read_text, with_settings
from llm.config_section import Section
from llm.errors import ConfigError
from llm.search.space import Space, parse_space
from llm.search.sweep_checks import require_population, require_searchable
from llm.search.trials import Trial
from llm.storage import is_s3, join, local_path

# Keys by which the evaluated tokens differ, or what precedes them.
_OTHER_TEXT = ("data.seq_len", "data.sources", "data.clean", "data.isolate_documents", "data.slice_bytes", "tokenizer", "model.path")


class SweepSection(Section):
    name: str = Field(pattern=NAME)
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the draws; a trial's own is run.seed")
    repeats: int = Field(default=1, ge=1, le=100, description="trials of each setting, with run.seed, run.seed + 1, ...")


class SearchSection(Section):
    searcher: Literal["random", "grid", "optuna", "bohb", "hyperopt"] = Field(
        default="random", description="see llm/search/searchers.py; hyperopt needs its package"
    )


class SchedulerSection(Section):
    """Which trials end early. A trial is judged by its evaluations, against the others at as many tokens."""

    kind: Literal["none", "asha", "median", "pbt"] = Field(default="asha", description="pbt: a population, llm/search/population.py")
    first_frac: float = Field(
        default=0.1, ge=1e-4, le=1, description="of a trial's tokens, before which no trial is stopped; pbt: from one exchange to the next"
    )
    reduction: float = Field(
        default=3, ge=1.1, le=16, description="asha: a rung is so many times the tokens of the one before; 1 in so many goes on to it"
    )
    quantile_frac: float = Field(default=0.25, gt=0, le=0.5, description="pbt: so many of the worst go on from as many of the best")


class BudgetSection(Section):
    """The sweep ends where the first of these is used up."""

    trials: int = Field(default=16, ge=1, le=100_000, description="repeats not counted")
    tokens: float | None = Field(default=None, gt=0, description="trained on, over all trials")
    hours: float | None = Field(default=None, gt=0, description="of training, all trials together")
    dollars: float | None = Field(default=None, gt=0, description="needs the run's log.dollars_per_worker_hour")
    max_concurrent: int | None = Field(default=None, ge=1, description="trials at once; None: as many as the cluster holds")


class SweepFile(Section):
    sweep: SweepSection
    run: str = Field(min_length=1)
    set: dict[str, Any] = Field(default={})
    space: dict[str, Any]
    search: SearchSection = SearchSection()
    scheduler: SchedulerSection = SchedulerSection()
    budget: BudgetSection = BudgetSection()


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked, with its run."""

    file: SweepFile
    space: Space
    base: RunConfig

    @property
    def uri(self) -> str:
        storage = self.base.run.storage
        return join(storage if is_s3(storage) else local_path(storage), self.file.sweep.name)

    @property
    def remarks(self) -> list[str]:
        """What a reader of the losses must know."""
        varied = [key for key in self.space.domains if is_below(key, _OTHER_TEXT) or any(is_below(each, [key]) for each in _OTHER_TEXT)]
        return [f"trials of different {key} predict different tokens: their losses cannot be compared as they stand" for key in varied]

    def with_settings(self, name: str, settings: dict[str, Any]) -> RunConfig:
        """The run with these settings; a length in tokens gives other steps for other batches. Raises ConfigError, calling it `name`."""
        anew = {"train.steps": None} if self.base.train.tokens else {}
        return with_settings(self.base, name, {**anew, **settings})

    def trial(self, trial: Trial) -> RunConfig:
        """The run of a trial. Raises ConfigError where its settings make none."""
        config = self.with_settings(f"trial {trial.number}", dict(trial.settings))
        storage, seed = join(self.uri, "trials"), config.run.seed + trial.repeat
        config = _with(config, "run", name=trial.run_name, storage=storage, seed=seed, if_finished="stop")
        config = _with(config, "train", until_step=None)
        cache = self.base.data.cache.uri or join(self.base.run.storage, "cache", "tokens")
        config = _with(config, "data", cache=config.data.cache.model_copy(update={"uri": cache if is_s3(cache) else local_path(cache)}))
        if not config.eval.every_steps:
            config = _with(config, "eval", every_steps=self.steps_between(config))
        # A sweep that is cut goes on from there: what a run saves every so often may be longer than a trial.
        saved_every = min(config.checkpoint.every_steps or config.train.steps, self.steps_between(config))
        config = _with(config, "checkpoint", every_steps=saved_every)
        if self.file.scheduler.kind == "pbt":
            interval = self.steps_between(config)
            if interval % config.eval.every_steps:
                config = _with(config, "eval", every_steps=interval)
            config = _with(config, "checkpoint", every_steps=interval, keep_every=interval)  # which others may start from
        if trial.takeovers:
            last = trial.takeovers[-1]
            config = _with(config, "checkpoint", start_from=join(storage, last.run, "checkpoints", step_folder(last.step)))
        return config

    def steps_between(self, config: RunConfig) -> int:
        """Steps from one evaluation to the next, so that each rung is one."""
        return max(1, round(config.train.steps * self.file.scheduler.first_frac))

    def most(self, section: str, key: str) -> int:
        """The largest whole number at a key of a section, in the run or in the space."""
        values = [getattr(getattr(self.base, section), key)]
        if domain := self.space.domains.get(f"{section}.{key}"):
            values = [int(value) for value in domain.options()]
        if domain := self.space.domains.get(section):  # of whole sections
            values += [int(value.get(key, 1)) for value in domain.options()]
        return max(values)

    def best(self, config: RunConfig) -> str:
        """A trial's configuration as a run of its own, in YAML."""
        run = self.base.run.model_copy(update={"name": f"{self.file.sweep.name}-best", "seed": config.run.seed})
        return dump_run(config.model_copy(update={"run": run}))


def load_sweep(path: str, overrides: list[str], with_files: bool = True) -> Sweep:
    """Raises ConfigError with what is wrong with the sweep, its run or a key of its space. `overrides`: of the run, as `set`. `with_files`:
    whether the files of model.path can be read here; else its keys are not checked."""
    raw = read_mapping(read_text(path), path)
    if {"model", "train"} <= raw.keys():
        raise ConfigError(f"{path} is a run, not a sweep: use headrace pretrain, or name it in a sweep (run: {Path(path).name}).")
    try:
        file = SweepFile.model_validate(raw)
    except ValidationError as error:
        told = [f"  {'.'.join(map(str, each['loc']))}: {_told(each)}" for each in error.errors()]
        raise ConfigError("\n".join([f"{path} is no sweep:", *told])) from None
    run_path = file.run if Path(file.run).is_absolute() else str(Path(path).parent / file.run)
    for override in overrides:
        if (section := override.partition("=")[0].split(".")[0].strip()) in ("sweep", "space", "search", "scheduler", "budget"):
            raise ConfigError(f"--set {override!r}: --set changes the run, and {section} is the sweep's. Change it in {path}.")
    settings = [f"{key}={yaml_value(value)}" for key, value in file.set.items()]
    base = parse_run(read_text(run_path), run_path, [*settings, *overrides])
    if file.budget.dollars and not base.log.dollars_per_worker_hour:
        raise ConfigError(
            f"{path}: budget.dollars={file.budget.dollars:g} needs log.dollars_per_worker_hour: give it in the run, or in `set`."
        )
    sweep = Sweep(file, parse_space(file.space), base)
    require_searchable(sweep, with_files)
    if file.scheduler.kind == "pbt":
        require_population(sweep)
    if not base.eval.rows:
        raise ConfigError(f"{run_path}: eval.rows=0, and trials are compared by their evaluation loss. Set eval.rows, for example to 64.")
    return sweep


def _told(problem: ErrorDetails) -> str:
    """What pydantic says; of an unknown key, the nearest there is."""
    if problem["type"] != "extra_forbidden":
        return problem["msg"]
    fields: dict[str, Any] = SweepFile.model_fields
    for name in problem["loc"][:-1]:
        fields = fields[str(name)].annotation.model_fields
    close = difflib.get_close_matches(str(problem["loc"][-1]), fields, n=1, cutoff=0)
    return f"no such key. Nearest: {close[0]}. Keys: {', '.join(fields)}"


def yaml_value(value: Any) -> str:
    """A value as --set takes it."""
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=1 << 30).removesuffix("\n...\n").strip()


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
