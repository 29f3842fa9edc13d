"""Where the tensors lie in a safetensors file of a checkpoint, by its header alone: strict, and without a byte of the tensors.

The format: 8 bytes of header length (little-endian), the header (JSON), the tensors' bytes one after another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llm.checkpoint.published import Published
from llm.checkpoint.strict_json import MAX_JSON_BYTES, strict_json
from llm.errors import DamagedCheckpointError

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_DIMS = 16


@dataclass(frozen=True)
class TensorPlace:
    dtype: str  # as safetensors names it: F32, U8, ...
    shape: tuple[int, ...]
    start: int  # bytes [start, stop) of the file, for Published.read_range
    stop: int


def tensor_places(published: Published, name: str) -> dict[str, TensorPlace]:
    """{tensor: its place} of a file. Raises DamagedCheckpointError where the header is none, or where sizes, shapes and places disagree:
    the tensors must fill the file without gap or overlap."""
    what, size = f"{published.uri}/{name}", published.entry(name).size_bytes
    if size < 8:
        raise DamagedCheckpointError(f"{what} has {size} bytes, too few for a file of tensors.")
    length = int.from_bytes(published.read_range(name, 0, 8), "little")
    if length > min(size - 8, MAX_JSON_BYTES):
        raise DamagedCheckpointError(f"{what} says that its header has {length} bytes, more than it can have.")
    raw = strict_json(published.read_range(name, 8, 8 + length), what)
    if not isinstance(raw, dict):
        raise DamagedCheckpointError(f"{what}: its header is no JSON object.")
    raw.pop("__metadata__", None)
    first = 8 + length
    places = {tensor: _place(entry, first, f"{what}: {tensor[:100]!r}") for tensor, entry in raw.items()}
    at = first
    for place in sorted(places.values(), key=lambda each: (each.start, each.stop)):
        if place.start != at:
            raise DamagedCheckpointError(f"{what}: its tensors overlap or leave a gap at byte {at}.")
        at = place.stop
    if at != size:
        raise DamagedCheckpointError(f"{what}: its tensors end at byte {at}, and it has {size}.")
    return places


def _place(entry: Any, first: int, what: str) -> TensorPlace:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DamagedCheckpointError(f"{what} must have exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise DamagedCheckpointError(f"{what} is of dtype {str(dtype)[:20]!r}. Legal: {', '.join(ITEM_BYTES)}.")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
        raise DamagedCheckpointError(f"{what} has the shape {str(shape)[:50]}, which is none.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise DamagedCheckpointError(f"{what} lies at {str(offsets)[:50]}, which is no place.")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise DamagedCheckpointError(f"{what} takes {offsets[1] - offsets[0]} bytes, and its shape {shape} of {dtype} does not.")
    return TensorPlace(dtype, tuple(shape), first + offsets[0], first + offsets[1])
