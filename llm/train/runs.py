"""A run's folder as the driver sees it: is it new, to be resumed, or finished?"""

from __future__ import annotations

from dataclasses import dataclass

from llm.checkpoint.layout import Layout
from llm.checkpoint.newest import read_newest, require_restorable
from llm.checkpoint.start import run_and_step, start_of
from llm.checkpoint.store import CheckpointStore
from llm.config import RunConfig
from llm.config_changes import MAY_DIFFER, config_differences
from llm.config_file import dump_run, parse_run
from llm.data.identity import Corpus, require_same_stream, write_stream
from llm.errors import ConfigError, TrainingError
from llm.metrics import MetricsTail, rows_of
from llm.storage import exists, is_s3, join, local_path, read_bytes, write_bytes
from llm.train.tune.auto import as_recorded

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"


def run_uri(config: RunConfig) -> str:
    """The run's folder, absolute where it is local: Ray Train's workers have a current directory of their own."""
    storage = config.run.storage
    return join(storage if is_s3(storage) else local_path(storage), config.run.name)


@dataclass(frozen=True)
class Claim:
    """The configuration under the name that this command trains, whether that run has ended already, and what the user is told."""

    config: RunConfig
    finished: bool = False
    note: str | None = None


def claim_run(config: RunConfig) -> Claim:
    """Which run this command is.

    A name without checkpoints starts from the beginning; an unfinished run goes on, if nothing that determines its result has changed
    (else ConfigError names what did); after a finished one `run.if_finished` decides: stop, or NAME-2, NAME-3, ...
    """
    number = 1
    while True:
        name = config.run.name if number == 1 else f"{config.run.name}-{number}"
        named = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        if not finished(named):
            step, damaged, before = _require_same_run(named)
            if step and before is not None:
                named = as_recorded(named, before)
                note = f"going on with {run_uri(named)} from its checkpoint at step {step}"
                return Claim(named, note=f"{damaged}\n{note}" if damaged else note)
            again = f"{config.run.name} is finished (run.if_finished=again): this run is {name}"
            return Claim(named, note=again if number > 1 else None)
        if named.train.last_step < named.train.steps:
            told = f"{run_uri(named)} has come to train.until_step={named.train.until_step}: nothing to do. Set a later one, or null."
            return Claim(named, finished=True, note=told)
        if config.run.if_finished == "stop":
            told = f"{run_uri(named)} is finished: nothing to do. Choose another run.name, raise train.steps, or set run.if_finished=again."
            return Claim(named, finished=True, note=told)
        number += 1


def record_run(config: RunConfig, corpus: Corpus, tokenizer: str) -> None:
    """Writes `config.yaml` beside the run's results, every value written out, and what its stream is made of. Where the run goes on from a
    checkpoint, raises ConfigError when the corpus or the tokenizer is no longer what it was."""
    uri = run_uri(config)
    if CheckpointStore(uri, config.s3).steps():
        require_same_stream(uri, corpus, tokenizer, config.s3)
    elif config.checkpoint.start_from:
        require_same_stream(run_and_step(config.checkpoint.start_from)[0], corpus, tokenizer, config.s3)
    write_stream(uri, corpus, tokenizer, config.s3)
    record_config(config)


def record_config(config: RunConfig) -> None:
    """Writes `config.yaml` over the one before."""
    write_bytes(join(run_uri(config), CONFIG), dump_run(config).encode(), config.s3)


def finished(config: RunConfig) -> bool:
    """Whether the run's own metrics say that it ended, at `train.last_step` or beyond."""
    uri = join(run_uri(config), METRICS)
    if not exists(uri, config.s3):
        return False
    data = read_bytes(uri, config.s3)
    ends = rows_of(MetricsTail(lambda offset: data[offset:]).poll(), "event", "end")
    return any(row.get("status") in ("finished", "paused") and row.get("step", 0) >= config.train.last_step for row in ends)


def require_finished(config: RunConfig) -> None:
    """Raises TrainingError where the workers came back without having written, in the place where the driver reads, that they ended."""
    if not finished(config):
        raise TrainingError(
            f"the workers returned, but {join(run_uri(config), METRICS)} does not say that the run ended. Is run.storage a folder that "
            "every node sees, or s3://bucket/prefix?"
        )


def _require_same_run(config: RunConfig) -> tuple[int, str | None, RunConfig | None]:
    """The step of the checkpoint that the run goes on from, 0 without one, what is wrong with newer ones, and the configuration that the
    run is recorded with; ConfigError where it is another run's."""
    uri = run_uri(config)
    recorded, store = join(uri, CONFIG), CheckpointStore(uri, config.s3)
    found = read_newest(store)
    if found is None or not exists(recorded, config.s3):
        _require_start(config)
        return 0, None, None
    state, there = found.value.train, found.value.layout
    require_restorable(there, _layout_like(there, config), state.step)
    before = parse_run(read_bytes(recorded, config.s3).decode(), recorded)
    changed = config_differences(before, config)
    if changed:
        told = "\n".join(f"  {line}" for line in changed)
        raise ConfigError(
            f"the unfinished run {uri} was started with another configuration:\n{told}\n"
            "  Set the values back to go on with it, or choose another run.name."
        )
    return state.step, found.note, before


def _layout_like(there: Layout, config: RunConfig) -> Layout:
    """The run's layout. The precision that `auto` is on the workers' hardware is theirs to compare."""
    parallel = config.parallel
    return Layout(parallel.workers, parallel.tensor, parallel.zero_stage, there.precision, config.train.optimizer)


def _require_start(config: RunConfig) -> None:
    """Raises ConfigError where the run cannot start from the checkpoint that `checkpoint.start_from` names."""
    begun = start_of(config)
    if begun is None:
        return
    uri, step = str(config.checkpoint.start_from), begun.train.step
    require_restorable(begun.layout, _layout_like(begun.layout, config), step)
    if step >= config.train.last_step:
        raise ConfigError(f"checkpoint.start_from={uri} holds {step} steps already, of train.steps={config.train.last_step}. Raise that.")
    recorded = join(run_and_step(uri)[0], CONFIG)
    before = parse_run(read_bytes(recorded, config.s3).decode(), recorded)
    if changed := config_differences(before, config, MAY_DIFFER):
        told = "\n".join(f"  {line}" for line in changed)
        raise ConfigError(
            f"checkpoint.start_from={uri} is of a run whose weights or stream are other ones:\n{told}\n"
            "  Set these values to those of that run, or leave checkpoint.start_from out."
        )
