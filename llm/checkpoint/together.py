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
