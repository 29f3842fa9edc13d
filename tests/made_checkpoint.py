"""Checkpoints of a small made-up model, written through the store as ranks write them, without an engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from safetensors.numpy import save as to_safetensors

from llm.checkpoint.index import INDEX, WEIGHT, Index, Piece, SavedTensor
from llm.checkpoint.layout import STATE, Layout, rank_file
from llm.checkpoint.store import CheckpointStore
from llm.state import TrainState

SHAPES = {"embed.weight": (12, 8), "layer.weight": (8, 8), "norm.weight": (8,)}
KEYS = (WEIGHT, "exp_avg", "exp_avg_sq")
LAYOUT = Layout(workers=2, tensor=1, zero_stage=1, precision="fp32", optimizer="adamw")
RANKS = 2


def values(name: str, key: str, step: int) -> np.ndarray:
    """What the tensor's key holds after `step` steps."""
    seed = int.from_bytes(hashlib.sha256(f"{name}|{key}|{step}".encode()).digest()[:4], "little")
    return np.random.default_rng(seed).standard_normal(SHAPES[name]).astype(np.float32)


def contents(step: int) -> dict[str, bytes]:
    """{file: bytes} of the checkpoint of `step`, its manifest left out. Each rank holds a half of each flattened tensor."""
    files: dict[str, bytes] = {}
    pieces: dict[str, list[Piece]] = {name: [] for name in SHAPES}
    rng = []
    for rank in range(RANKS):
        held: dict[str, np.ndarray] = {"rng|torch": np.frombuffer(f"random state {rank} {step}".encode(), dtype=np.uint8)}
        for name, shape in SHAPES.items():
            half = int(np.prod(shape)) // RANKS
            for key in KEYS:
                held[f"{name}|{key}"] = values(name, key, step).reshape(-1)[rank * half : (rank + 1) * half].copy()
        data = to_safetensors(held)
        first = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:first])
        begins = {name: first + about["data_offsets"][0] for name, about in header.items() if name != "__metadata__"}
        for name, shape in SHAPES.items():
            half = int(np.prod(shape)) // RANKS
            pieces[name].append(Piece(rank, 0, 1, rank * half, half, tuple(begins[f"{name}|{key}"] for key in KEYS)))
        rng.append({"torch": (begins["rng|torch"], held["rng|torch"].size)})
        files[rank_file(rank)] = data
    tensors = {
        name: SavedTensor("trained", "F32", shape, None, KEYS, {"step": step}, tuple(pieces[name])) for name, shape in SHAPES.items()
    }
    files[INDEX] = Index(tensors, (), tuple(rng)).to_json()
    state = TrainState(step=step, tokens=100 * step, ledger=hashlib.sha256(str(step).encode()).hexdigest())
    files[STATE] = json.dumps({"train": state.to_json(), "layout": asdict(LAYOUT), "loss_scaler": {}}).encode()
    return files


def publish(store: CheckpointStore, step: int, files: dict[str, bytes] | None = None) -> str:
    """Saves the made-up model, or the files given; returns the checkpoint's URI."""
    folder = store.begin(step)
    entries = {name: store.write(folder, name, [data]) for name, data in (files or contents(step)).items()}
    return store.publish(step, folder, entries)


def read_all(store: CheckpointStore, step: int, use: Callable[[str, str, Any], None] = lambda name, key, tensor: None) -> None:
    """Everything that a restore reads, `use`d tensor by tensor as it would be."""
    from llm.checkpoint.newest import state_of
    from llm.checkpoint.read import read_index, read_whole

    published = store.open(step)
    state_of(published)
    for name, key, tensor in read_whole(published, read_index(published)):
        use(name, key, tensor)
