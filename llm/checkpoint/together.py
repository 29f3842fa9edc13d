"""Doing a thing on every rank, or failing on every rank: a rank that raised alone would leave the others waiting for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from llm.errors import CheckpointError

T = TypeVar("T")


def together(act: Callable[[], T], what: str) -> T:
    """`act()` of this rank. Raises CheckpointError on all ranks where it raised on one: there with its cause, elsewhere with the ranks
    that failed. `what` ends "rank 3 could not ..."."""
    error: Exception | None = None
    result: T | None = None
    try:
        result = act()
    except Exception as caught:
        error = caught
    failed = torch.tensor([0 if error is None else 1])
    flags = [torch.zeros_like(failed) for _ in range(dist.get_world_size())]
    dist.all_gather(flags, failed)
    if error is not None:
        raise CheckpointError(f"rank {dist.get_rank()} could not {what}: {error}") from error
    if ranks := [rank for rank, flag in enumerate(flags) if int(flag)]:
        raise CheckpointError(f"rank {', '.join(map(str, ranks))} could not {what}; its own message says why.")
    return result  # pyright: ignore[reportReturnType]


def gather_bytes(mine: bytes) -> list[bytes]:
    """What every rank gave, by rank, on every rank: as numbers, since objects would travel as pickle. All ranks must call it."""
    size = torch.tensor([len(mine)])
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    room = max(1, *(int(each) for each in sizes))
    padded = torch.zeros(room, dtype=torch.uint8)
    padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else padded[:0]
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded)
    return [row[: int(length)].numpy().tobytes() for row, length in zip(rows, sizes, strict=True)]
