"""Where a run stands when it begins: at its own newest checkpoint, at another run's that it starts from, or at nothing. No torch here."""

from __future__ import annotations

from llm.checkpoint.layout import step_folder, step_of
from llm.checkpoint.newest import SavedState, newest_state, state_of
from llm.checkpoint.store import CheckpointStore
from llm.config import RunConfig
from llm.errors import CheckpointError, ConfigError
from llm.state import TrainState
from llm.storage import is_s3, local_path


def run_and_step(uri: str) -> tuple[str, int]:
    """The run's folder and the step of a checkpoint's URI. Raises ConfigError where it is none."""
    folder, _, name = (uri if is_s3(uri) else local_path(uri)).rstrip("/").rpartition("/")
    run_uri, _, checkpoints = folder.rpartition("/")
    step = step_of(name)
    if step is None or checkpoints != "checkpoints":
        raise ConfigError(f"checkpoint.start_from={uri} is no checkpoint of a run: give RUN/checkpoints/{step_folder(96)}.")
    return run_uri, step


def start_store(config: RunConfig) -> tuple[CheckpointStore, int] | None:
    """The checkpoints that `checkpoint.start_from` is one of, and its step; None without one. Raises ConfigError where it is not there."""
    uri = config.checkpoint.start_from
    if uri is None:
        return None
    run_uri, step = run_and_step(uri)
    store = CheckpointStore(run_uri, config.s3)
    if step not in (steps := store.steps()):
        near = f"Nearest that is there: {store.path_of(min(steps, key=lambda each: abs(each - step)))}" if steps else "That run has none"
        raise ConfigError(f"checkpoint.start_from={uri} is not there. {near}.")
    return store, step


def start_of(config: RunConfig) -> SavedState | None:
    """What the checkpoint that a run starts from says of itself. Raises ConfigError where it cannot be used."""
    found = start_store(config)
    if found is None:
        return None
    store, step = found
    try:
        published = store.open(step)
        published.require_files()
        return state_of(published)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.start_from={config.checkpoint.start_from} cannot be used: {error}") from None


def first_state(own: CheckpointStore, config: RunConfig) -> TrainState:
    """The state of the run's own newest good checkpoint, else of the one that it starts from, else a fresh one."""
    state = newest_state(own)
    if state.step:
        return state
    begun = start_of(config)
    return begun.train if begun else state
