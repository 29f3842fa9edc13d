"""Writes a checkpoint: every rank what it owns, rank 0 what all share, then one act publishes it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save as to_safetensors
from torch import Tensor

from llm.checkpoint.fragments import optimizer_state, owned_fragments, tensors_of, undivided_state
from llm.checkpoint.layout import STATE, Layout, RankIndex, manifest, rank_files
from llm.checkpoint.store import CheckpointStore
from llm.checkpoint.together import together
from llm.parallel.zero import Engine
from llm.state import TrainState
from llm.storage import join, write_bytes

RNG = "rng|torch"
Fingerprint = dict[str, int | str]  # size_bytes, sha256


def save_checkpoint(engine: Engine, state: TrainState, layout: Layout, store: CheckpointStore, keep: int) -> str:
    """Saves and publishes the state after `state.step` steps; returns the checkpoint's URI. All ranks must call it.

    Raises CheckpointError on every rank when one of them could not write.
    """
    rank = engine.mesh.rank
    if rank == 0:
        store.clear(state.step)
    dist.barrier()
    folder = store.writing(state.step)
    written = _fingerprints_of_all(engine, together(lambda: _write_rank(engine, folder, store), "write its part of the checkpoint"))
    uri = ""
    if rank == 0:
        data = _state_json(engine, state, layout)
        write_bytes(join(folder, STATE), data, store.s3)
        uri = store.publish(state.step, manifest({**written, STATE: _fingerprint(data)}, state.step))
        store.prune(keep)
    dist.barrier()
    return uri


def _write_rank(engine: Engine, folder: str, store: CheckpointStore) -> dict[str, Fingerprint]:
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
    for name, data in contents.items():
        write_bytes(join(folder, name), data, store.s3)
    return {name: _fingerprint(data) for name, data in contents.items()}


def _fingerprints_of_all(engine: Engine, mine: dict[str, Fingerprint]) -> dict[str, Fingerprint]:
    """What every rank wrote, by file name, on every rank: as numbers, since objects would travel as pickle."""
    row = torch.zeros((2, 8 + 32), dtype=torch.uint8)  # weights and index: size (8 bytes), SHA-256; a size of 0: wrote nothing
    for i, name in enumerate(rank_files(engine.mesh.rank)):
        if name in mine:
            raw = int(mine[name]["size_bytes"]).to_bytes(8, "little") + bytes.fromhex(str(mine[name]["sha256"]))
            row[i] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    rows = [torch.empty_like(row) for _ in range(engine.mesh.world_size)]
    dist.all_gather(rows, row)
    found: dict[str, Fingerprint] = {}
    for rank, told in enumerate(rows):
        for name, values in zip(rank_files(rank), told, strict=True):
            raw = bytes(values.tolist())
            if size := int.from_bytes(raw[:8], "little"):
                found[name] = {"size_bytes": size, "sha256": raw[8:].hex()}
    return found


def _state_json(engine: Engine, state: TrainState, layout: Layout) -> bytes:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    scale: dict[str, Any] = (
        {key: value for key, value in vars(scaler).items() if isinstance(value, int | float | bool)} if scaler is not None else {}
    )
    return json.dumps({"train": state.to_json(), "layout": asdict(layout), "loss_scaler": scale}, indent=1).encode()


def _fingerprint(data: bytes) -> Fingerprint:
    return {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
