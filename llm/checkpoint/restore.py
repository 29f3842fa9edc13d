"""Reads a checkpoint back into an engine: of the same layout, each rank its own file; of another one, assembled from all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load as from_safetensors
from torch import Tensor

from llm.checkpoint.fragments import Fragment, optimizer_state, owned_fragments, refresh_weights
from llm.checkpoint.layout import STATE, WEIGHT, FragmentIndex, Layout, RankIndex, rank_files, step_folder
from llm.checkpoint.newest import require_restorable
from llm.checkpoint.published import Published
from llm.checkpoint.save import RNG
from llm.checkpoint.store import CheckpointStore
from llm.checkpoint.together import together
from llm.errors import CheckpointError
from llm.parallel.zero import Engine
from llm.state import TrainState

Counters = dict[str, int | float]


class _Saved(Protocol):
    """What a checkpoint holds for one rank of the engine that it is restored into."""

    def fragment(self, fragment: Fragment) -> dict[str, Tensor]:
        """The fragment's weight and moments, 1-D fp32, by key."""
        ...

    def undivided(self, group: int) -> dict[str, Tensor]:
        """State of a flat group that is not laid out as the group is."""
        ...

    def counters(self, group: int) -> Counters: ...

    @property
    def rng(self) -> Tensor: ...


@torch.no_grad()
def restore_checkpoint(engine: Engine, state: TrainState, layout: Layout, store: CheckpointStore) -> None:
    """Puts weights, optimizer state, counters, loss scale and the random state of `state.step` back. All ranks must call it.

    Raises CheckpointError where the checkpoint does not fit or a file is damaged, before any tensor is used.
    """
    published = store.open(state.step)
    raw = json.loads(published.read(STATE))
    there = Layout(**raw["layout"])
    require_restorable(there, layout, state.step)
    offsets = None if there == layout else _tensor_offsets(engine)

    def read() -> _Saved:
        if offsets is None:
            return _SameLayout(engine, published)
        return _AnyLayout(offsets, store, published)

    saved = together(read, "read its part of the checkpoint")
    fused = any(group.get("fused") for group in engine.optimizer.param_groups)
    for fragment in owned_fragments(engine):
        entry = optimizer_state(engine, fragment)
        for key, value in saved.counters(fragment.group).items():
            # As the optimizer made it: a Python number, or a tensor, which fused kernels want on the weights' device.
            entry[key] = value if isinstance(value, int) else torch.tensor(value, device=fragment.flat.device if fused else "cpu")
        for key, value in saved.undivided(fragment.group).items():
            entry[key] = value.to(fragment.flat.device)
        for key, value in saved.fragment(fragment).items():
            if key != WEIGHT and key not in entry:
                entry[key] = torch.zeros_like(fragment.flat)
            fragment.of(fragment.flat if key == WEIGHT else entry[key]).copy_(value)
    refresh_weights(engine)
    if raw["loss_scaler"] and hasattr(engine.optimizer, "loss_scaler"):  # at stage 0 there is none
        vars(engine.optimizer.loss_scaler).update(raw["loss_scaler"])
    engine.deepspeed.global_steps = state.step
    torch.set_rng_state(saved.rng)


class _SameLayout:
    """This rank's own file."""

    def __init__(self, engine: Engine, published: Published) -> None:
        # At stage 0 one tensor group wrote for all data ranks.
        rank = engine.mesh.rank if engine.stage else engine.mesh.tensor_rank
        self._step = published.step
        self._tensors, self._index = _read_rank(published, rank)

    def fragment(self, fragment: Fragment) -> dict[str, Tensor]:
        if self._index.fragments.get(fragment.name) != fragment.index:
            raise CheckpointError(f"checkpoint {step_folder(self._step)} holds another part of {fragment.name} than this rank owns.")
        return _with_prefix(self._tensors, fragment.name)

    def undivided(self, group: int) -> dict[str, Tensor]:
        return _with_prefix(self._tensors, f"group-{group}")

    def counters(self, group: int) -> Counters:
        return self._index.counters.get(str(group), {})

    @property
    def rng(self) -> Tensor:
        return self._tensors[RNG]


class _AnyLayout:
    """Whole tensors, put together from all ranks' files, and cut to what this rank owns. Every rank reads all files and holds all of the
    model and its moments for a moment."""

    def __init__(self, tensor_offsets: dict[str, int], store: CheckpointStore, published: Published) -> None:
        self._step = published.step
        self._whole = dict(read_full_tensors(store, published.step))
        self._tensor_offsets = tensor_offsets
        tensors, index = _read_rank(published, 0)
        self._rng = tensors[RNG]
        every = list(index.counters.values())
        if any(each != every[0] for each in every):
            raise CheckpointError(f"checkpoint {step_folder(self._step)}: its parameter groups have done different numbers of updates.")
        self._counters = every[0] if every else {}

    def fragment(self, fragment: Fragment) -> dict[str, Tensor]:
        return {key: self._cut(fragment, whole) for key, whole in self._tensors_of(fragment).items()}

    def undivided(self, group: int) -> dict[str, Tensor]:
        return {}

    def counters(self, group: int) -> Counters:
        return self._counters

    @property
    def rng(self) -> Tensor:
        return self._rng

    def _tensors_of(self, fragment: Fragment) -> dict[str, Tensor]:
        found = self._whole.get(fragment.name)
        if found is None or tuple(found[WEIGHT].shape) != fragment.index.full_shape:
            raise CheckpointError(f"checkpoint {step_folder(self._step)} has no {fragment.name} of shape {fragment.index.full_shape}.")
        return found

    def _cut(self, fragment: Fragment, whole: Tensor) -> Tensor:
        index = fragment.index
        if index.split_dim is not None:
            whole = whole.narrow(index.split_dim, self._tensor_offsets[fragment.name], index.part_shape[index.split_dim])
        return whole.reshape(-1).narrow(0, index.start, index.numel)


def _tensor_offsets(engine: Engine) -> dict[str, int]:
    """Where this tensor rank's part of each split parameter begins. All ranks must call it: parts may differ in size."""
    names, sizes = [], []
    for name, parameter in engine.module.named_parameters():
        part, full = tuple(getattr(parameter, "ds_shape", parameter.shape)), engine.full_shapes[name]
        dims = [i for i, (a, b) in enumerate(zip(part, full, strict=True)) if a != b]
        if dims:
            names.append(name)
            sizes.append(part[dims[0]])
    mine = torch.tensor(sizes, dtype=torch.int64)
    every = [torch.empty_like(mine) for _ in range(engine.mesh.world_size)]
    if names:
        dist.all_gather(every, mine)
    before = [every[rank] for rank in engine.mesh.tensor_group if rank < engine.mesh.rank]
    return {name: sum(int(sizes[i]) for sizes in before) for i, name in enumerate(names)}


def read_full_weights(store: CheckpointStore, step: int) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, whole fp32 weight) of a checkpoint, assembled on the CPU, in no particular order."""
    for name, tensors in read_full_tensors(store, step, keys=(WEIGHT,)):
        yield name, tensors[WEIGHT]


def read_full_tensors(store: CheckpointStore, step: int, keys: tuple[str, ...] | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(parameter name, its whole weight and moments by key) of a checkpoint, from all ranks' fragments; only `keys` where given."""
    published = store.open(step)
    parts: dict[tuple[str, str], dict[int, Tensor]] = {}
    about: dict[str, FragmentIndex] = {}
    for rank in sorted(int(name[5:10]) for name in published.files if name.endswith(".safetensors")):
        tensors, index = _read_rank(published, rank)
        for name, fragment in index.fragments.items():
            about[name] = fragment
            for key, piece in _with_prefix(tensors, name).items():
                if keys is None or key in keys:
                    by_rank = parts.setdefault((name, key), {})
                    part = by_rank.setdefault(index.tensor_rank, torch.full(fragment.part_shape, float("nan")))
                    part.view(-1)[fragment.start : fragment.start + fragment.numel] = piece
    whole: dict[str, dict[str, Tensor]] = {}
    for (name, key), by_rank in parts.items():
        ordered = [by_rank[rank] for rank in sorted(by_rank)]
        dim = about[name].split_dim
        tensor = ordered[0] if dim is None else torch.cat(ordered, dim=dim)
        if tuple(tensor.shape) != about[name].full_shape or bool(tensor.isnan().any()):
            raise CheckpointError(f"checkpoint {step_folder(step)}: {name} is incomplete, or holds NaN.")
        whole.setdefault(name, {})[key] = tensor
    yield from whole.items()


def _read_rank(published: Published, rank: int) -> tuple[dict[str, Tensor], RankIndex]:
    weights_name, index_name = rank_files(rank)
    tensors = from_safetensors(published.read(weights_name, published.entry(weights_name).size_bytes))
    return tensors, RankIndex.from_json(published.read(index_name))


def _with_prefix(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}|"
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
