"""Doing a thing on every rank, or failing on every rank: a rank that raised alone would leave the others waiting for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llm.errors import CheckpointError, DamagedCheckpointError, LeaseError

T = TypeVar("T")
_FINE, _DAMAGED, _FAILED = 0, 1, 2


def together(act: Callable[[], T], what: str, group: Any = None) -> T:
    """`act()` of this rank. Raises CheckpointError on all ranks where it raised on one: there with its cause, elsewhere with the ranks
    that failed. It is a DamagedCheckpointError on all of them where every cause is one. `what` ends "rank 3 could not ..."; `group`: a gloo
    group of all ranks, for threads that must not use the default one."""
    error: Exception | None = None
    result: T | None = None
    try:
        result = act()
    except Exception as caught:
        error = caught
    verdict = _FINE if error is None else _DAMAGED if isinstance(error, DamagedCheckpointError) else _FAILED
    verdicts = [int(each) for each in _all_gather(torch.tensor([verdict]), group)]
    kind = CheckpointError if _FAILED in verdicts else DamagedCheckpointError
    if isinstance(error, LeaseError):  # no failure: this driver has no more to say here
        raise error
    if error is not None:
        raise kind(f"rank {dist.get_rank()} could not {what}: {error}") from error
    if ranks := [rank for rank, each in enumerate(verdicts) if each != _FINE]:
        raise kind(f"rank {', '.join(map(str, ranks))} could not {what}; its own message says why.")
    return result  # pyright: ignore[reportReturnType]


def bytes_of_all(data: bytes, group: Any = None) -> list[bytes]:
    """What every rank gives, in rank order, on rank 0; an empty list on the others. As numbers: objects would travel as pickle."""
    sizes = [int(size) for size in _all_gather(torch.tensor([len(data)]), group)]
    longest = max(1, *sizes)
    mine = torch.zeros(longest, dtype=torch.uint8)
    if data:
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = [torch.empty(longest, dtype=torch.uint8) for _ in sizes] if dist.get_rank() == 0 else None
    dist.gather(mine, rows, dst=0, group=group)
    return [row[:size].numpy().tobytes() for row, size in zip(rows, sizes, strict=True)] if rows is not None else []


def bytes_of_first(data: bytes, group: Any = None) -> bytes:
    """What rank 0 gives, on every rank."""
    size = torch.tensor([len(data)])
    dist.broadcast(size, src=0, group=group)
    told = torch.zeros(int(size), dtype=torch.uint8)
    if dist.get_rank() == 0 and data:
        told = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if len(told):
        dist.broadcast(told, src=0, group=group)
    return told.numpy().tobytes()


def _all_gather(value: torch.Tensor, group: Any) -> list[torch.Tensor]:
    every = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(every, value, group=group)
    return every
