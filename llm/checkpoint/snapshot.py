"""What a rank's file holds, copied to host memory: from then on the engine may change it.

The copy is one buffer that is the file's data as it stands, so nothing is copied again to be written. It is made once and used again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm.checkpoint.dtypes import DTYPES, TORCH_TYPES
from llm.checkpoint.fragments import Ownership
from llm.checkpoint.index import ITEM_BYTES, WEIGHT, Piece, SavedTensor, Undivided, told
from llm.checkpoint.manifest import BLOCK_BYTES
from llm.parallel.zero import Engine

_ALIGNMENT = 8  # of the data within the file: the size of the largest item


class _Item(NamedTuple):
    name: str  # in the safetensors file
    dtype: str
    source: Tensor  # live, 1-D


@dataclass(frozen=True)
class Plan:
    """What will be copied, and what the rank tells of it. Made while nothing moves, in milliseconds; it holds views, no copies."""

    sources: list[tuple[Tensor, int, int, torch.dtype]]  # live values; first byte in the data, bytes and type of the copy
    header: bytes
    num_bytes: int  # of the data
    told: bytes
    ready: Any  # on a GPU: the event after which the values may be read


def plan_snapshot(engine: Engine, ownership: Ownership) -> Plan:
    """The rank's part of a checkpoint of the engine as it is now. Takes the random states at once."""
    rng = {"torch": torch.get_rng_state()}
    if engine.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(engine.device)
    items: list[_Item] = [_Item(f"rng|{name}", "U8", state) for name, state in rng.items()]
    mine, undivided = [], {}
    for fragment in ownership.fragments():
        for key, value in fragment.undivided().items():
            undivided[f"group-{fragment.group}|{key}"] = (fragment.group, key, value)
        if fragment.is_saved_here:
            values = fragment.values()
            mine.append((fragment, tuple(values)))
            dtype = DTYPES[fragment.weight.dtype] if fragment.kind == "buffer" else "F32"
            items += [_Item(f"{fragment.name}|{key}", dtype, value) for key, value in values.items()]
    items += [_Item(name, "F32", value) for name, (_, _, value) in undivided.items()]
    # The largest items first, so that all are aligned without gaps, which the format does not allow; weights before moments, so that an
    # export reads a third of the file.
    items.sort(key=lambda item: (-ITEM_BYTES[item.dtype], not item.name.endswith(f"|{WEIGHT}")))
    sources, at, ranges = [], 0, {}
    for item in items:
        num_bytes = item.source.numel() * ITEM_BYTES[item.dtype]
        sources.append((item.source, at, num_bytes, TORCH_TYPES[item.dtype]))
        ranges[item.name] = (at, num_bytes)
        at += num_bytes
    header = _header(items, ranges)
    begins = {name: len(header) + begin for name, (begin, _) in ranges.items()}
    tensors = {
        fragment.name: SavedTensor(
            fragment.kind,
            DTYPES[fragment.weight.dtype] if fragment.kind == "buffer" else "F32",
            fragment.shape,
            fragment.split_dim,
            keys,
            fragment.counters(),
            (
                Piece(
                    0,
                    fragment.part_offset,
                    fragment.part_size,
                    fragment.start,
                    fragment.numel,
                    tuple(begins[f"{fragment.name}|{key}"] for key in keys),
                ),
            ),
        )
        for fragment, keys in mine
    }
    rows = [Undivided(0, begins[name], tuple(value.shape), group, key) for name, (group, key, value) in undivided.items()]
    said = told(tensors, rows, {name: (begins[f"rng|{name}"], len(state)) for name, state in rng.items()})
    ready = torch.cuda.current_stream(engine.device).record_event() if engine.device.type == "cuda" else None
    return Plan(sources, header, at, said, ready)


class HostBuffer:
    """Host memory for one snapshot, kept for the next; pinned where the engine is on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = torch.empty(0, dtype=torch.uint8)
        self._stream: Any = None

    def copy(self, plan: Plan) -> None:
        """Copies what was planned. On a GPU on a stream of its own, beside the one that computes; returns when all has arrived."""
        if len(self._held) < plan.num_bytes:
            self._held = torch.empty(0, dtype=torch.uint8)  # first give the old one back
            self._held = torch.empty(plan.num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._stream.wait_event(plan.ready)
            with torch.cuda.stream(self._stream):
                self._copy(plan)
            self._stream.synchronize()
        else:
            self._copy(plan)

    def _copy(self, plan: Plan) -> None:
        for source, begin, num_bytes, dtype in plan.sources:
            target = self._held[begin : begin + num_bytes].view(dtype)
            source = source.detach().reshape(-1)
            if source.device.type == "cpu" and source.dtype == dtype:
                # One thread's work, while others train; torch would take all cores.
                np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
            else:
                target.copy_(source, non_blocking=True)

    def chunks(self, plan: Plan) -> Iterator[memoryview]:
        """The file's bytes, in pieces of at most a block."""
        yield memoryview(plan.header)
        data = self._held.numpy().data[: plan.num_bytes]
        for begin in range(0, plan.num_bytes, BLOCK_BYTES):
            yield data[begin : begin + BLOCK_BYTES]


def _header(items: list[_Item], ranges: dict[str, tuple[int, int]]) -> bytes:
    """The beginning of a safetensors file: 8 bytes of length, then JSON, padded so that the data begins at a multiple of 8."""
    shapes = {
        item.name: {
            "dtype": item.dtype,
            "shape": [item.source.numel()],
            "data_offsets": [ranges[item.name][0], sum(ranges[item.name])],
        }
        for item in items
    }
    text = json.dumps(shapes, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
