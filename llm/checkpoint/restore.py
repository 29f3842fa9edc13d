"""Reads the newest checkpoint back into an engine of the same layout."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from safetensors.torch import load as from_safetensors
from torch import Tensor

from llm.checkpoint.fragments import optimizer_state, owned_fragments, refresh_weights
from llm.checkpoint.layout import STATE, WEIGHT, Layout, RankIndex, rank_files, step_folder
from llm.checkpoint.newest import require_same_layout
from llm.checkpoint.save import RNG
from llm.checkpoint.store import CheckpointStore
from llm.checkpoint.together import together
from llm.errors import CheckpointError
from llm.parallel.zero import Engine
from llm.state import TrainState


@torch.no_grad()
def restore_checkpoint(engine: Engine, state: TrainState, layout: Layout, store: CheckpointStore) -> None:
    """Puts weights, optimizer state, counters, loss scale and the random state of `state.step` back. All ranks must call it.

    Raises CheckpointError where the layout differs or a file is damaged, before any tensor is used.
    """
    files = store.read_manifest(state.step)
    raw = json.loads(store.read_verified(state.step, STATE, files))
    require_same_layout(Layout(**raw["layout"]), layout, state.step)
    # At stage 0 one tensor group wrote for all data ranks.
    rank = engine.mesh.rank if engine.stage else engine.mesh.tensor_rank
    tensors, index = together(lambda: _read_rank(store, state.step, rank, files), "read its part of the checkpoint")
    fused = any(group.get("fused") for group in engine.optimizer.param_groups)
    for fragment in owned_fragments(engine):
        if index.fragments.get(fragment.name) != fragment.index:
            raise CheckpointError(f"checkpoint {step_folder(state.step)} holds another part of {fragment.name} than this rank owns.")
        fragment.of(fragment.flat).copy_(tensors[f"{fragment.name}|{WEIGHT}"])
        entry = optimizer_state(engine, fragment)
        for key, value in index.counters.get(str(fragment.group), {}).items():
            # As the optimizer made it: a Python number, or a tensor, which fused kernels want on the weights' device.
            entry[key] = value if isinstance(value, int) else torch.tensor(value, device=fragment.flat.device if fused else "cpu")
        for key in _state_keys(tensors, f"group-{fragment.group}"):
            entry[key] = tensors[f"group-{fragment.group}|{key}"].to(fragment.flat.device)
        for key in _state_keys(tensors, fragment.name):
            if key not in entry:
                entry[key] = torch.zeros_like(fragment.flat)
            fragment.of(entry[key]).copy_(tensors[f"{fragment.name}|{key}"])
    refresh_weights(engine)
    if raw["loss_scaler"]:
        vars(engine.optimizer.loss_scaler).update(raw["loss_scaler"])
    engine.deepspeed.global_steps = state.step
    torch.set_rng_state(tensors[RNG])


def read_full_weights(store: CheckpointStore, step: int) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, whole fp32 weight) of a checkpoint, assembled from all ranks' fragments on the CPU, in no particular order."""
    files = store.read_manifest(step)
    ranks = sorted(int(name[5:10]) for name in files if name.endswith(".safetensors"))
    parts: dict[str, dict[int, Tensor]] = {}
    about = {}
    for rank in ranks:
        tensors, index = _read_rank(store, step, rank, files)
        for name, fragment in index.fragments.items():
            about[name] = fragment
            part = parts.setdefault(name, {}).setdefault(index.tensor_rank, torch.full(fragment.part_shape, float("nan")))
            part.view(-1)[fragment.start : fragment.start + fragment.numel] = tensors[f"{name}|{WEIGHT}"]
    for name, by_tensor_rank in parts.items():
        ordered = [by_tensor_rank[rank] for rank in sorted(by_tensor_rank)]
        dim = about[name].split_dim
        weight = ordered[0] if dim is None else torch.cat(ordered, dim=dim)
        if tuple(weight.shape) != about[name].full_shape or bool(weight.isnan().any()):
            raise CheckpointError(f"checkpoint {step_folder(step)}: {name} is incomplete, or holds NaN.")
        yield name, weight


def _read_rank(store: CheckpointStore, step: int, rank: int, files: dict) -> tuple[dict[str, Tensor], RankIndex]:
    weights_name, index_name = rank_files(rank)
    tensors = from_safetensors(store.read_verified(step, weights_name, files))
    return tensors, RankIndex.from_json(store.read_verified(step, index_name, files))


def _state_keys(tensors: dict[str, Tensor], name: str) -> list[str]:
    prefix = f"{name}|"
    return [key[len(prefix) :] for key in tensors if key.startswith(prefix) and key != f"{prefix}{WEIGHT}"]
