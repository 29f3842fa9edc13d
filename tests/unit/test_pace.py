"""A rank that is lastingly slower than the others is named, once."""

from __future__ import annotations

import time
from typing import Any

import torch

from llm.train.pace import SLOW_BATCHES, ForwardClock, SlowRanks


def test_a_rank_twice_as_slow_for_long_is_named_once():
    slow = SlowRanks()
    said = [slow.look([2000, 2100, 6100, 1900]) for _ in range(3 * SLOW_BATCHES)]
    assert [number for number, found in enumerate(said) if found] == [SLOW_BATCHES - 1]
    assert said[SLOW_BATCHES - 1].keys() == {2} and 2.9 < said[SLOW_BATCHES - 1][2] < 3.1


def test_of_two_ranks_the_slower_is_named_and_a_single_one_never():
    slow = SlowRanks()
    assert {1} in [slow.look([1000, 2500]).keys() for _ in range(SLOW_BATCHES)]
    assert not any(SlowRanks().look([5000]) for _ in range(SLOW_BATCHES))


def test_a_moment_of_slowness_and_tiny_passes_are_nothing():
    slow = SlowRanks()
    assert not any(slow.look([2000, 9000 if number % SLOW_BATCHES else 2000]) for number in range(100))
    assert not any(slow.look([10, 90]) for _ in range(100))


def test_the_clock_counts_forward_passes_and_nothing_else():
    class Sleeps(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return x

    clock, module = ForwardClock(), Sleeps()
    clock.attach(module, torch.device("cpu"))
    for _ in range(3):
        module(torch.ones(1))
    time.sleep(0.1)
    assert 60_000 <= clock.take() < 100_000
    assert clock.take() == 0


def test_the_clock_stands_still_while_weights_are_gathered_and_outside_of_forward_passes():
    class Sleeps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight: Any = torch.nn.Parameter(torch.ones(1))
            weight.ds_persist = False  # as DeepSpeed says of a weight that it gathers, in a hook of its own
            self.weight = weight
            self.register_forward_pre_hook(lambda *_: time.sleep(0.1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return x * self.weight

    layers = torch.nn.Sequential(Sleeps(), Sleeps())
    clock = ForwardClock()
    clock.attach(layers, torch.device("cpu"))
    layers(torch.ones(1))
    time.sleep(0.1)
    layers[0](torch.ones(1))  # as the backward pass does to compute activations again
    layers[1](torch.ones(1))
    assert 40_000 <= clock.take() < 100_000
