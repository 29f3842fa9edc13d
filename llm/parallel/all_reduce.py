"""How fast an all-reduce is between processes, one a node. Knows no Ray: each process calls `measure` with its rank."""

from __future__ import annotations

import datetime
import time

import torch
import torch.distributed as dist

SIZES_BYTES = (1 << 20, 64 << 20)
ROUNDS = 3


def measure(rank: int, world_size: int, where: str, backend: str, timeout_s: float) -> dict[int, float]:
    """Bus bandwidth in GB/s (1e9 bytes) by the size of the buffer in bytes: 2 (n - 1) / n of it, over the fastest of ROUNDS rounds, as
    nccl-tests define it, so that groups of any size compare. `where`: host:port at which rank 0 may listen.

    Every rank must call it. Raises where the group does not form within `timeout_s`, or a sum is wrong. Leaves no group behind.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    device = torch.device("cuda") if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, init_method=f"tcp://{where}", rank=rank, world_size=world_size, timeout=timeout)
    try:
        return {size: _gb_per_s(size, world_size, device) for size in SIZES_BYTES}
    finally:
        dist.destroy_process_group()


def _gb_per_s(size_bytes: int, world_size: int, device: torch.device) -> float:
    times_s: list[float] = []
    for _ in range(ROUNDS + 1):  # the first opens connections
        buffer = torch.ones(size_bytes // 4, dtype=torch.float32, device=device)
        _settle(device)
        dist.barrier()
        began_s = time.perf_counter()
        dist.all_reduce(buffer)
        _settle(device)
        times_s.append(time.perf_counter() - began_s)
        if not bool((buffer == world_size).all()):
            raise RuntimeError(f"the all-reduce of {size_bytes} bytes gave wrong sums")
    return 2 * (world_size - 1) / world_size * size_bytes / min(times_s[1:]) / 1e9


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
