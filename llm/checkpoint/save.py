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

from llm.checkpoint.fragments import optimizer_state, owned_fragments, tensors_of
from llm.checkpoint.layout import STATE, Layout, RankIndex, manifest, rank_files
from llm.checkpoint.store import CheckpointStore
from llm.errors import CheckpointError
from llm.parallel.zero import Engine
from llm.state import TrainState
from llm.storage import join, read_bytes, write_bytes

RNG = "rng|torch"


def save_checkpoint(engine: Engine, state: TrainState, layout: Layout, store: CheckpointStore, keep: int) -> str:
    """Saves and publishes the state after `state.step` steps; returns the checkpoint's URI. All ranks must call it.

    Raises CheckpointError on every rank when one of them could not write.
    """
    rank = engine.mesh.rank
    if rank == 0:
        store.clear(state.step)
    dist.barrier()
    folder = store.writing(state.step)
    _together(lambda: _write_rank(engine, folder, store), rank)
    uri = ""
    if rank == 0:
        files = {}
        write_bytes(join(folder, STATE), _state_json(engine, state, layout), store.s3)
        for r in range(engine.mesh.world_size):
            if _writes(engine, r):
                files |= json.loads(read_bytes(join(folder, f"rank-{r:05d}.files"), store.s3))
        data = read_bytes(join(folder, STATE), store.s3)
        files[STATE] = _fingerprint(data)
        uri = store.publish(state.step, manifest(files, state.step))
        store.prune(keep)
    dist.barrier()
    return uri


def _write_rank(engine: Engine, folder: str, store: CheckpointStore) -> None:
    if not _writes(engine, engine.mesh.rank):
        return
    tensors: dict[str, Tensor] = {RNG: torch.get_rng_state()}
    index, counters = {}, {}
    for fragment in owned_fragments(engine):
        index[fragment.name] = fragment.index
        for key, value in tensors_of(engine, fragment).items():
            tensors[f"{fragment.name}|{key}"] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        entry = optimizer_state(engine, fragment)
        counters[str(fragment.group)] = {
            key: float(value) for key, value in entry.items() if not isinstance(value, Tensor) or value.dim() == 0
        }
    weights_name, index_name = rank_files(engine.mesh.rank)
    contents = {
        weights_name: to_safetensors(tensors),
        index_name: RankIndex(engine.mesh.tensor_rank, index, counters).to_json().encode(),
    }
    for name, data in contents.items():
        write_bytes(join(folder, name), data, store.s3)
    written = {name: _fingerprint(data) for name, data in contents.items()}
    write_bytes(join(folder, f"rank-{engine.mesh.rank:05d}.files"), json.dumps(written).encode(), store.s3)


def _writes(engine: Engine, rank: int) -> bool:
    """At stage 0 all data ranks hold the same: the first tensor group writes."""
    return engine.stage > 0 or rank < engine.mesh.tensor_size


def _state_json(engine: Engine, state: TrainState, layout: Layout) -> bytes:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    scale: dict[str, Any] = {
        key: value for key, value in vars(scaler).items() if isinstance(value, int | float | bool)
    } if scaler is not None else {}
    return json.dumps({"train": state.to_json(), "layout": asdict(layout), "loss_scaler": scale}, indent=1).encode()


def _fingerprint(data: bytes) -> dict[str, Any]:
    return {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _together(write: Any, rank: int) -> None:
    """Runs `write` on every rank; one rank's failure raises on all, so that none waits at a barrier for ever."""
    error: Exception | None = None
    try:
        write()
    except Exception as caught:
        error = caught
    failed = torch.tensor([0 if error is None else 1])
    if torch.cuda.is_available():
        failed = failed.cuda()
    dist.all_reduce(failed)
    if error is not None:
        raise CheckpointError(f"rank {rank} could not write its part of the checkpoint: {error}") from error
    if int(failed):
        raise CheckpointError(f"{int(failed)} ranks could not write their part of the checkpoint; their messages say why.")
