"""Writes a checkpoint: every rank what it owns, rank 0 what all share, then one act publishes it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from llm.checkpoint.fragments import optimizer_state, owned_fragments, tensors_of, undivided_state
from llm.checkpoint.layout import STATE, Layout, RankIndex, rank_files
from llm.checkpoint.manifest import FileEntry
from llm.checkpoint.store import CheckpointStore
from llm.checkpoint.together import gather_bytes, together
from llm.parallel.zero import Engine
from llm.state import TrainState

RNG = "rng|torch"


def save_checkpoint(engine: Engine, state: TrainState, layout: Layout, store: CheckpointStore, keep: int, keep_every: int = 0) -> str:
    """Saves and publishes the state after `state.step` steps; returns the checkpoint's URI. All ranks must call it.

    Raises CheckpointError on every rank when one of them could not write.
    """
    first = engine.mesh.rank == 0
    folder = together(lambda: store.begin(state.step) if first else "", "begin the checkpoint")
    folder = gather_bytes(folder.encode())[0].decode()
    written = together(lambda: _write_rank(engine, folder, store), "write its part of the checkpoint")
    rows = gather_bytes(json.dumps({name: entry.to_json() for name, entry in written.items()}).encode())
    entries = {name: FileEntry.from_json(raw) for row in rows for name, raw in json.loads(row).items()}

    def publish() -> str:
        if not first:
            return ""
        entries[STATE] = store.write(folder, STATE, [_state_json(engine, state, layout)])
        uri = store.publish(state.step, folder, entries)
        store.prune(keep, keep_every)
        return uri

    return together(publish, "publish the checkpoint")


def _write_rank(engine: Engine, folder: str, store: CheckpointStore) -> dict[str, FileEntry]:
    """Writes this rank's files; what they are, by name. At stage 0 all data ranks hold the same: the first tensor group writes."""
    if engine.stage == 0 and engine.mesh.rank >= engine.mesh.tensor_size:
        return {}
    tensors: dict[str, Tensor] = {RNG: torch.get_rng_state()}
    index, counters = {}, {}
    for fragment in owned_fragments(engine):
        index[fragment.name] = fragment.index
        held = {f"{fragment.name}|{key}": value for key, value in tensors_of(engine, fragment).items()}
        for name, value in (held | undivided_state(engine, fragment)).items():
            if name not in tensors:
                tensors[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        entry = optimizer_state(engine, fragment)
        counters[str(fragment.group)] = {
            key: value if isinstance(value, int) else float(value)
            for key, value in entry.items()
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
        }
    weights_name, index_name = rank_files(engine.mesh.rank)
    contents = {
        weights_name: to_safetensors(tensors),
        index_name: RankIndex(engine.mesh.tensor_rank, index, counters).to_json().encode(),
    }
    return {name: store.write(folder, name, [data]) for name, data in contents.items()}


def _state_json(engine: Engine, state: TrainState, layout: Layout) -> bytes:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    scale: dict[str, Any] = (
        {key: value for key, value in vars(scaler).items() if isinstance(value, int | float | bool)} if scaler is not None else {}
    )
    return json.dumps({"train": state.to_json(), "layout": asdict(layout), "loss_scaler": scale}, indent=1).encode()
