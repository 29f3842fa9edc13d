"""Where a run stands, by its newest good checkpoint. Reads no tensors and imports no torch: the driver and Ray's controller ask this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from llm.checkpoint.layout import STATE, Layout, step_folder
from llm.checkpoint.published import Published
from llm.checkpoint.store import CheckpointStore
from llm.checkpoint.strict_json import strict_json
from llm.errors import CheckpointError, DamagedCheckpointError
from llm.state import TrainState

T = TypeVar("T")


@dataclass(frozen=True)
class Newest(Generic[T]):
    published: Published
    value: T  # what the check returned
    damage: tuple[tuple[int, str], ...]  # newer checkpoints that were passed over: step, what is wrong

    @property
    def note(self) -> str | None:
        """What a user is told where this is not the newest of all."""
        if not self.damage:
            return None
        told = "\n".join(f"  {step_folder(step)}: {why}" for step, why in self.damage)
        return f"{len(self.damage)} newer checkpoint(s) cannot be used; taking step {self.published.step} instead:\n{told}"


def newest_good(store: CheckpointStore, check: Callable[[Published], T]) -> Newest[T] | None:
    """The newest checkpoint that opens and passes `check`, which raises DamagedCheckpointError for one that does not; None where the run
    has none at all. Any other error of `check` ends the search: an older checkpoint would not help.

    Raises CheckpointError where there are checkpoints and none is good: starting anew would throw the run away unasked.
    """
    damage: list[tuple[int, str]] = []
    for step in store.steps():
        try:
            published = store.open(step)
            return Newest(published, check(published), tuple(damage))
        except DamagedCheckpointError as error:
            damage.append((step, str(error)))
    if not damage:
        return None
    told = "\n".join(f"  {step_folder(step)}: {why}" for step, why in damage)
    raise CheckpointError(
        f"no checkpoint in {store.uri} can be used:\n{told}\n  To start anew, remove that folder or choose another run.name."
    )


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint's state.json says."""

    train: TrainState
    layout: Layout
    loss_scaler: dict[str, int | float | bool]


def read_newest(store: CheckpointStore) -> Newest[SavedState] | None:
    """The newest checkpoint whose manifest and state are whole and whose files are there in their sizes: tensors are not read, so that a
    restore may still find it damaged."""

    def check(published: Published) -> SavedState:
        published.require_files()
        return state_of(published)

    return newest_good(store, check)


def newest_state(store: CheckpointStore) -> TrainState:
    """Where a run stands: the newest good checkpoint's state, or a fresh one."""
    found = read_newest(store)
    return found.value.train if found else TrainState()


def state_of(published: Published) -> SavedState:
    """What a checkpoint says of itself. Raises DamagedCheckpointError where that is not what a checkpoint can say."""
    what = f"{published.uri}/{STATE}"
    raw = strict_json(published.read(STATE), what)
    try:
        _require_kinds(raw["train"])
        train = TrainState.from_json(raw["train"])
        layout = Layout(**{field.name: _of_kind(raw["layout"][field.name], str(field.type)) for field in fields(Layout)})
        scaler = raw["loss_scaler"]
        _require_numbers(scaler)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{what} is no checkpoint's state: {type(error).__name__}: {str(error)[:200]}.") from None
    if train.step != published.step:
        raise DamagedCheckpointError(f"{what} is of step {train.step}, and lies in the folder of step {published.step}.")
    return SavedState(train, layout, scaler)


def require_restorable(there: Layout, here: Layout, step: int) -> None:
    """Raises CheckpointError where a checkpoint of layout `there` cannot go on as `here`: ZeRO stage, tensor size and workers may differ,
    but not what the numbers mean."""
    fixed = [line for line in there.differences(here) if line.startswith(("precision=", "optimizer="))]
    if fixed:
        raise CheckpointError(
            f"checkpoint {step_folder(step)} was saved by another kind of run ({'; '.join(fixed)}). Set the values back, or choose another "
            "run.name."
        )
    if there != here and here.optimizer == "muon":
        raise CheckpointError(
            f"checkpoint {step_folder(step)} was saved with another layout ({'; '.join(there.differences(here))}), and Muon's state goes "
            "to the same layout only. Set the values back, or choose another run.name."
        )


def _require_kinds(train: Any) -> None:
    cursor = train["cursor"]
    for number in (train["step"], train["tokens"], cursor["epoch"], cursor["window"], cursor["offset"], *train["counts"].values()):
        if _of_kind(number, "int") < 0:
            raise ValueError(f"{number} is below 0")
    if not isinstance(cursor["began"], list):
        raise TypeError("cursor.began is no list")
    _of_kind(train["ledger"], "str")
    _require_numbers(train["history"])


def _require_numbers(values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float):
            raise TypeError(f"{name}={str(value)[:50]!r} is no number")


def _of_kind(value: Any, kind: str) -> Any:
    if type(value).__name__ != kind:
        raise TypeError(f"{str(value)[:50]!r} stands where {kind} belongs")
    return value
