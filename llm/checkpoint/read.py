"""Saved tensors -> memory, whatever layout they were saved in: only the blocks that are needed, each once, each verified before it is used.

A block (16 MiB) is the unit of verification, so it is the unit of reading too: memory is bounded by what is filled, plus one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from llm.checkpoint.dtypes import TORCH_TYPES
from llm.checkpoint.geometry import Band, Box, band, intersections, lines_and_columns
from llm.checkpoint.index import INDEX, ITEM_BYTES, WEIGHT, Index, SavedTensor
from llm.checkpoint.layout import rank_file
from llm.checkpoint.manifest import BLOCK_BYTES
from llm.checkpoint.published import Published
from llm.errors import CheckpointError

_TOGETHER_BYTES = 256 << 20  # small tensors are read this many bytes at a time: else each would cost a block


class Target(NamedTuple):
    """Memory to fill: elements [start, start + values.numel()) of a flattened part of a saved tensor's values of one key.

    `split_dim` is the target's own: None for a whole tensor, whatever the saved one was.
    """

    name: str
    key: str
    split_dim: int | None
    part_offset: int
    part_size: int
    start: int
    values: Tensor  # 1-D, of any type and device


class _Need(NamedTuple):
    """A saved piece that holds elements of a target: bytes [first, end) of the file cover them."""

    first: int
    end: int
    piece_first: int  # the byte of the piece's first element
    piece_start: int
    saved: Band
    wanted: Band
    boxes: list[Box]
    dtype: str
    target: Target


def read_index(published: Published) -> Index:
    return Index.from_json(published.read(INDEX), {name: entry.size_bytes for name, entry in published.files.items()})


@torch.no_grad()
def fill(published: Published, index: Index, targets: Iterable[Target]) -> None:
    """Fills the targets. Raises CheckpointError where a tensor is not in the checkpoint, DamagedCheckpointError where bytes are damaged:
    then some targets may be filled already."""
    needs: dict[int, list[_Need]] = {}
    for target in targets:
        saved = index.tensors.get(target.name)
        if saved is None or target.key not in saved.keys:
            raise CheckpointError(f"the checkpoint holds no {target.key} of {target.name}.")
        for file, need in _needs(saved, target):
            needs.setdefault(file, []).append(need)
    for file, of_file in sorted(needs.items()):
        _fill_from(published, rank_file(file), of_file)


def _needs(saved: SavedTensor, target: Target) -> Iterator[tuple[int, _Need]]:
    dims = {dim for dim in (saved.split_dim, target.split_dim) if dim is not None}
    if len(dims) > 1:
        raise CheckpointError(f"{target.name} was split in dimension {saved.split_dim}, and is split in {target.split_dim} here.")
    dim = next(iter(dims), None)
    size = lines_and_columns(saved.shape, dim)[1]
    offset, part_size = (target.part_offset, target.part_size) if target.split_dim is not None else (0, size)
    wanted = band(saved.shape, dim, offset, part_size)
    wanted_boxes = list(wanted.boxes(target.start, target.start + target.values.numel()))
    item_bytes, key = ITEM_BYTES[saved.dtype], saved.keys.index(target.key)
    for piece in saved.pieces:
        offset, part_size = (piece.part_offset, piece.part_size) if saved.split_dim is not None else (0, size)
        there = band(saved.shape, dim, offset, part_size)
        boxes = list(intersections(there.boxes(piece.start, piece.start + piece.numel), wanted_boxes))
        if boxes:
            first = min(there.flat(box.line, box.column) for box in boxes)
            end = max(there.flat(box.end_line - 1, box.end_column - 1) for box in boxes) + 1
            base = piece.begins[key]
            begin = base + (first - piece.start) * item_bytes
            need = _Need(begin, begin + (end - first) * item_bytes, base, piece.start, there, wanted, boxes, saved.dtype, target)
            yield piece.file, need


def _fill_from(published: Published, name: str, needs: list[_Need]) -> None:
    """Reads each block that is needed once, in order."""
    needs.sort(key=lambda need: need.first)
    size = published.files[name].size_bytes
    waiting, at, active = 0, 0, []
    while waiting < len(needs) or active:
        if not active:
            at = needs[waiting].first
        at = at // BLOCK_BYTES * BLOCK_BYTES
        end = min(at + BLOCK_BYTES, size)
        while waiting < len(needs) and needs[waiting].first < end:
            active.append(needs[waiting])
            waiting += 1
        data = torch.frombuffer(published.read_range(name, at, end), dtype=torch.uint8)
        for need in active:
            _copy(need, data, at, end)
        active = [need for need in active if need.end > end]
        at = end


def _copy(need: _Need, data: Tensor, block_first: int, block_end: int) -> None:
    """Copies what the block [block_first, block_end) of the file, `data`, holds of the need."""
    item_bytes = ITEM_BYTES[need.dtype]
    first, end = max(need.first, block_first), min(need.end, block_end)
    # Items lie on multiples of their size, and so do blocks: none is cut.
    values = data[first - block_first : end - block_first].view(TORCH_TYPES[need.dtype])
    start = need.piece_start + (first - need.piece_first) // item_bytes
    here = list(need.saved.boxes(start, start + len(values)))
    target = need.target.values
    for box in intersections(here, need.boxes):
        size = (box.end_line - box.line, box.end_column - box.column)
        from_first = need.saved.flat(box.line, box.column) - start
        to_first = need.wanted.flat(box.line, box.column) - need.target.start
        source = values.as_strided(size, (need.saved.width, 1), values.storage_offset() + from_first)
        target.as_strided(size, (need.wanted.width, 1), target.storage_offset() + to_first).copy_(source)


def read_whole(published: Published, index: Index, keys: tuple[str, ...] | None = None) -> Iterator[tuple[str, str, Tensor]]:
    """(name, key, whole tensor on the CPU) of every saved tensor, by name and then key; only `keys` where given. Holds a few hundred MB of
    small tensors, or one large one, at a time."""
    wanted = [(name, key) for name in sorted(index.tensors) for key in sorted(index.tensors[name].keys) if keys is None or key in keys]
    while wanted:
        batch: list[tuple[str, str, Tensor]] = []
        num_bytes = 0
        for name, key in wanted:
            saved = index.tensors[name]
            num_bytes += prod(saved.shape) * ITEM_BYTES[saved.dtype]
            if batch and num_bytes > _TOGETHER_BYTES:
                break
            batch.append((name, key, torch.empty(saved.shape, dtype=TORCH_TYPES[saved.dtype])))
        fill(published, index, [Target(name, key, None, 0, 1, 0, whole.view(-1)) for name, key, whole in batch])
        wanted = wanted[len(batch) :]
        yield from batch


def read_full_weights(published: Published) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) of every parameter, fp32, and every persistent buffer, in the order of their names."""
    for name, _, whole in read_whole(published, read_index(published), (WEIGHT,)):
        yield name, whole
