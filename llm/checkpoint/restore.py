"""Puts a checkpoint back into an engine of any layout, or an older one where it is damaged.

Each rank computes which bytes hold what it owns, and reads and verifies the blocks that these lie in (`llm/checkpoint/read.py`), straight
into the engine. No step is taken before every rank has all of its own: where one finds damage, all go on to the checkpoint before it
together, which overwrites everything.

The random state of a rank is that of the same rank when the layout is the same. In another layout, data rank d, tensor rank t gets the one
of data rank d mod the saved data size, tensor rank 0, so that the ranks of a tensor group draw alike: a model with dropout then goes on
with other draws than undisturbed, one without is not touched by it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from llm.checkpoint.fragments import Fragment, Ownership, refresh_weights
from llm.checkpoint.index import ITEM_BYTES, WEIGHT, Counters, Index
from llm.checkpoint.layout import Layout, rank_file, step_folder
from llm.checkpoint.newest import SavedState, require_restorable, state_of
from llm.checkpoint.published import Published
from llm.checkpoint.read import Target, fill, read_index
from llm.checkpoint.store import CheckpointStore
from llm.checkpoint.together import bytes_of_first, together
from llm.errors import CheckpointError, DamagedCheckpointError
from llm.parallel.zero import Engine
from llm.state import TrainState


def restore_newest(
    engine: Engine, at_most: int, layout: Layout, store: CheckpointStore, tell: Callable[[int, str, str], None]
) -> TrainState:
    """Restores the newest checkpoint of at most `at_most` steps that is whole, and returns its state. All ranks must call it; where they
    say different numbers, the least counts.

    Damaged ones are set aside on the way: `tell(step, why, where it is now)` on rank 0. Raises CheckpointError where no whole one is left:
    a run that lost all its checkpoints must not begin anew unasked.
    """
    least = torch.tensor([at_most])
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    state, damage = _restore_first(engine, lambda step: step <= int(least), layout, store, tell)
    if state is None:
        raise CheckpointError(f"{store.uri} holds no whole checkpoint of at most {int(least)} steps. {damage}".strip())
    return state


def restore_sound(
    engine: Engine, before: int, layout: Layout, store: CheckpointStore, tell: Callable[[int, str, str], None]
) -> TrainState | None:
    """Restores the newest whole checkpoint of before step `before` that was not saved within a row of bad steps; its state, or None where
    there is none. All ranks must call it, with the same step."""

    def sound(step: int) -> bool:
        try:
            return step < before and state_of(store.open(step)).train.history.sound
        except DamagedCheckpointError:
            return True  # restoring it will find the same, and set it aside

    return _restore_first(engine, sound, layout, store, tell)[0]


def _restore_first(
    engine: Engine, wanted: Callable[[int], bool], layout: Layout, store: CheckpointStore, tell: Callable[[int, str, str], None]
) -> tuple[TrainState | None, str]:
    """The state of the newest whole checkpoint among those that rank 0 wants, and what was wrong with the first that was not whole."""
    ownership, first_damage = Ownership(engine), ""
    while (step := _newest_step(store, wanted)) is not None:
        try:
            return restore_checkpoint(engine, step, layout, store, ownership), first_damage
        except DamagedCheckpointError as error:
            first_damage = first_damage or str(error)
            set_aside = partial(store.set_aside, step)
            aside = together(lambda act=set_aside: act() if engine.mesh.rank == 0 else "", "set the damaged checkpoint aside")
            if engine.mesh.rank == 0:
                tell(step, str(error), aside)
    return None, first_damage


def _newest_step(store: CheckpointStore, wanted: Callable[[int], bool]) -> int | None:
    """The newest that rank 0 sees and wants, and every rank must see too: a folder that a node does not have is no damage."""
    steps = together(store.steps, "list the checkpoints")
    chosen = together(lambda: next(filter(wanted, steps), -1) if dist.get_rank() == 0 else -1, "look at the checkpoints")
    step = int(bytes_of_first(str(chosen).encode()))

    def require_seen() -> None:
        if step >= 0 and step not in steps:
            raise CheckpointError(
                f"{store.uri} has no {step_folder(step)} here, and rank 0 sees one. All nodes must share the run's folder."
            )

    together(require_seen, "see the checkpoints")
    return step if step >= 0 else None


@torch.no_grad()
def restore_checkpoint(engine: Engine, step: int, layout: Layout, store: CheckpointStore, ownership: Ownership | None = None) -> TrainState:
    """Puts weights, optimizer state, counters, loss scale and the random state of `step` back; returns the run's state there. All ranks
    must call it. `layout`: the engine's.

    Raises on every rank, DamagedCheckpointError where bytes are not those that were saved, CheckpointError where the checkpoint is of
    another model or kind of run. The engine is not to be used then before another checkpoint was restored.
    """
    ownership = ownership or Ownership(engine)

    def read() -> tuple[Published, Index, SavedState]:
        published = store.open(step)
        return published, read_index(published), state_of(published)

    published, index, saved = together(read, f"read {step_folder(step)}")
    require_restorable(saved.layout, layout, step)
    fragments = ownership.fragments()
    together(lambda: _require_same_model(index, fragments, step), f"use {step_folder(step)}")

    def put_back() -> None:
        fill(published, index, [target for fragment in fragments for target in _targets(index, fragment)])
        _put_undivided(published, index, fragments, engine.mesh.rank)
        _put_counters(index, fragments, step)
        _put_rng(engine, published, index, saved.layout, layout)

    together(put_back, f"read its part of {step_folder(step)}")
    refresh_weights(engine)
    _put_scale(engine, saved.loss_scaler)
    engine.deepspeed.global_steps = saved.train.step
    return saved.train


def _require_same_model(index: Index, fragments: list[Fragment], step: int) -> None:
    """Every tensor that the rank owns is there, of the same shape and trained or not as here. What is there and not here is somebody's:
    the other way around would be silent."""
    for fragment in fragments:
        saved = index.tensors.get(fragment.name)
        if saved is None or saved.shape != fragment.shape:
            raise CheckpointError(
                f"checkpoint {step_folder(step)} was saved from another model: it has "
                f"{'no' if saved is None else f'a {saved.shape}'} {fragment.name}, and here it is {fragment.shape}."
            )
        if saved.kind != fragment.kind:
            raise CheckpointError(
                f"checkpoint {step_folder(step)} was saved from a run in which {fragment.name} is {saved.kind}, and here it is "
                f"{fragment.kind}. Set back what is trained, or choose another run.name."
            )


def _targets(index: Index, fragment: Fragment) -> list[Target]:
    """What to read of a fragment. Makes the optimizer's state where it has none yet; a moment that was not saved, since its parameter never
    had a gradient, begins at zero."""
    saved = index.tensors[fragment.name]
    if fragment.flat is not None:
        entry = fragment.optimizer.state[fragment.flat]
        for key in saved.keys:
            if key != WEIGHT and key not in entry:
                entry[key] = torch.zeros_like(fragment.flat)
    found = []
    for key, values in fragment.values().items():
        if key in saved.keys:
            part = (fragment.split_dim, fragment.part_offset, fragment.part_size)
            found.append(Target(fragment.name, key, *part, fragment.start, values))
        else:
            values.zero_()
    return found


def _put_counters(index: Index, fragments: list[Fragment], step: int) -> None:
    """AdamW's step and the like, which a flat tensor has once for all parameters in it."""
    found: dict[int, tuple[Fragment, Counters]] = {}
    for fragment in fragments:
        counters = index.tensors[fragment.name].counters
        if fragment.flat is None or not counters:
            continue
        other, theirs = found.setdefault(id(fragment.flat), (fragment, counters))
        if theirs != counters:
            raise CheckpointError(
                f"checkpoint {step_folder(step)}: {other.name} and {fragment.name} have done different numbers of updates ({theirs} and "
                f"{counters}), and share one in this layout. Restore it with parallel.zero_stage=0."
            )
    for fragment, counters in found.values():
        entry = fragment.optimizer.state[fragment.flat]
        for key, value in counters.items():
            entry[key] = _as_the_optimizer_keeps(value, entry.get(key), fragment)


def _as_the_optimizer_keeps(value: float, held: Any, fragment: Fragment) -> Any:
    """torch's optimizers count in fp32 tensors, which their fused kernels want on the weights' device; DeepSpeed's in Python numbers."""
    if isinstance(held, torch.Tensor):
        return torch.tensor(value, dtype=held.dtype, device=held.device)
    if held is not None:
        return type(held)(value)
    if isinstance(value, float) or type(fragment.optimizer).__module__.startswith("torch."):
        fused = any(group.get("fused") for group in fragment.optimizer.param_groups)
        return torch.tensor(float(value), device=fragment.weight.device if fused else "cpu")
    return value


def _put_undivided(published: Published, index: Index, fragments: list[Fragment], rank: int) -> None:
    of_rank = [each for each in index.undivided if each.file == rank]
    flats = {fragment.group: fragment for fragment in fragments if fragment.flat is not None}
    for each in of_rank:
        if each.group in flats:
            fragment = flats[each.group]
            data = published.read_range(rank_file(rank), each.begin, each.begin + prod(each.shape) * ITEM_BYTES["F32"])
            value = torch.frombuffer(data, dtype=torch.float32).view(each.shape)
            fragment.optimizer.state[fragment.flat][each.key] = value.to(fragment.weight.device)


def _put_rng(engine: Engine, published: Published, index: Index, there: Layout, here: Layout) -> None:
    mesh = engine.mesh
    rank = mesh.rank if there == here else mesh.data_rank % (there.workers // there.tensor) * there.tensor
    if rank >= index.num_ranks:
        raise DamagedCheckpointError(f"{published.uri} holds {index.num_ranks} ranks, and says that it is of {there.workers}.")
    states = {
        name: torch.frombuffer(published.read_range(rank_file(rank), begin, begin + num_bytes), dtype=torch.uint8)
        for name, (begin, num_bytes) in index.rng[rank].items()
    }
    torch.set_rng_state(states["torch"])
    if "cuda" in states and engine.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], engine.device)


def _put_scale(engine: Engine, scale: dict[str, Any]) -> None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)  # at stage 0 there is none
    if scaler is not None:
        known = vars(scaler)
        known.update({key: value for key, value in scale.items() if isinstance(known.get(key), int | float)})
