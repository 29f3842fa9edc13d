"""Where a run stands, by its newest checkpoint. Reads no tensors and imports no torch: the driver and Ray's controller ask this."""

from __future__ import annotations

import json

from llm.checkpoint.layout import STATE, Layout, step_folder
from llm.checkpoint.store import CheckpointStore
from llm.errors import CheckpointError
from llm.state import TrainState


def read_state(store: CheckpointStore) -> tuple[TrainState, Layout] | None:
    """What the newest checkpoint says of itself, without its tensors; None where there is none."""
    steps = store.steps()
    if not steps:
        return None
    raw = json.loads(store.open(steps[0]).read(STATE))
    return TrainState.from_json(raw["train"]), Layout(**raw["layout"])


def newest_state(store: CheckpointStore) -> TrainState:
    """Where a run stands: the newest checkpoint's state, or a fresh one."""
    found = read_state(store)
    return found[0] if found else TrainState()


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
