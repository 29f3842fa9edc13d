"""Which rank computes slower than the others, lastingly: a throttled card, a busy core, a bad cable to its memory.

A step takes as long on every rank, because all wait for the slowest. What differs is the forward pass, which a rank does by itself (with
its tensor group, which shows as one; at ZeRO stage 3 every layer's weights are gathered in it, and nothing is seen). The ranks tell each
other theirs along with what they know of a batch, so it costs no message.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

SLOW = 2.0  # times the median of the other ranks
SLOW_BATCHES = 20  # in a row
LEAST_US = 1000  # shorter forward passes are noise


class ForwardClock:
    """The time of this process's forward passes, in whole microseconds."""

    def __init__(self) -> None:
        self._began: Any = None
        self._us = 0
        self._events: list[tuple[Any, Any]] = []  # of a GPU, read when it has come so far

    def attach(self, module: torch.nn.Module, device: torch.device) -> None:
        on_gpu = device.type == "cuda"

        def before(*_: Any) -> None:
            self._began = _event() if on_gpu else time.perf_counter()

        def after(*_: Any) -> None:
            if on_gpu:
                self._events.append((self._began, _event()))
            else:
                self._us += round(1e6 * (time.perf_counter() - self._began))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def take(self) -> int:
        """Microseconds since the last call; never waits for a GPU. Another thread than the training one calls it."""
        while self._events and self._events[0][1].query():
            began, ended = self._events.pop(0)
            self._us += round(1000 * began.elapsed_time(ended))
        taken = self._us
        self._us -= taken
        return taken


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class SlowRanks:
    """Told each batch's times by rank, says once of each rank that it is slow, and how many times slower."""

    def __init__(self) -> None:
        self._in_a_row: Counter[int] = Counter()

    def look(self, times_us: Sequence[int]) -> dict[int, float]:
        found = {}
        for rank, mine in enumerate(times_us):
            others = [each for other, each in enumerate(times_us) if other != rank]
            usual = statistics.median(others) if others else 0.0
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if usual >= LEAST_US and mine > SLOW * usual else 0
            if self._in_a_row[rank] == SLOW_BATCHES:
                found[rank] = mine / usual
        return found
