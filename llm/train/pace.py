"""Which rank computes slower than the others, lastingly: a throttled card, a busy core, a bad cable to its memory.

A step takes as long on every rank, because all wait for the slowest. What differs is the forward pass, which a rank does by itself (with
its tensor group, which shows as one). At ZeRO stage 3 it waits there, too: layers' weights are gathered from all ranks just before they are
used, so the clock stands still meanwhile. The ranks tell each other their times along with what they know of a batch, so it costs no
message.
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
    """The time that this process computes in its forward passes, in whole microseconds."""

    def __init__(self) -> None:
        self._on_gpu = False
        self._in_forward = False
        self._began: Any = None
        self._us = 0
        self._events: list[tuple[Any, Any]] = []  # of a GPU, read when it has come so far

    def attach(self, module: torch.nn.Module, device: torch.device) -> None:
        """Measures `module` from now on. At ZeRO stage 3 it must be DeepSpeed's already: the hooks that gather must lie between ours."""
        self._on_gpu = device.type == "cuda"

        def before(*_: Any) -> None:
            self._in_forward = True
            self._run()

        def after(*_: Any) -> None:
            self._stop()
            self._in_forward = False

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        gathering = [each for each in module.modules() if _is_gathered(each)]
        if not gathering:
            return

        # Layers run in the backward pass as well, where activations are computed again: no time of the forward pass.
        def pause(*_: Any) -> None:
            if self._in_forward:
                self._stop()

        def go_on(*_: Any) -> None:
            if self._in_forward:
                self._run()

        uncompiled: Any = torch.compiler.disable  # as DeepSpeed's hooks between them are
        for each in gathering:
            each.register_forward_pre_hook(uncompiled(pause), prepend=True)
            each.register_forward_pre_hook(uncompiled(go_on))

    def _run(self) -> None:
        self._began = _event() if self._on_gpu else time.perf_counter()

    def _stop(self) -> None:
        if self._on_gpu:
            self._events.append((self._began, _event()))
        else:
            self._us += round(1e6 * (time.perf_counter() - self._began))

    def take(self) -> int:
        """Microseconds since the last call; never waits for a GPU. Another thread than the training one calls it."""
        while self._events and self._events[0][1].query():
            began, ended = self._events.pop(0)
            self._us += round(1000 * began.elapsed_time(ended))
        taken = self._us
        self._us -= taken
        return taken


def _is_gathered(module: torch.nn.Module) -> bool:
    """Whether DeepSpeed gathers weights of the module before each of its forward passes; small ones it keeps."""
    return any(not getattr(each, "ds_persist", True) for each in module.parameters(recurse=False))


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
