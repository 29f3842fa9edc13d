"""A checkpoint saved in any layout goes on in any other: ZeRO 0-3 x tensor size 1, 2 x data size 1, 2, which are 256 pairs. With peft's
adapters, which train at tensor size 1 only, they are 64."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm.checkpoint.digest import digest
from llm.checkpoint.read import read_full_weights, read_index
from tests.distributed import layouts
from tests.distributed.checkpoint_runs import LAYOUTS, MODEL, Layout, layout_config, open_store, restore_and_go_on, train_and_save
from tests.distributed.layouts import run_ranks
from tests.distributed.lora import on_lora

SAVED_AT, GOES_ON = 3, 10
TOLERANCE = 1e-4  # of a loss: fp32 sums in another order
Act = Callable[..., Any]


def compare(
    folder: Path,
    sources: list[Layout],
    targets: list[Layout],
    train_and_save: Act = train_and_save,
    restore_and_go_on: Act = restore_and_go_on,
) -> float:
    """Saves once in each of `sources` while training goes on, restores all of them in each of `targets`. Returns the largest difference of
    a loss to the undisturbed run's. The last two are what the ranks do."""
    undisturbed: dict[Layout, list[float]] = {}
    for source in sources:
        config = layout_config(source, SAVED_AT + GOES_ON)
        world_size = config.parallel.workers
        undisturbed[source] = run_ranks(train_and_save, world_size, config, str(folder / _name(source)), SAVED_AT, MODEL)[0]
        assert len(undisturbed[source]) == GOES_ON
    digests = {source: digest(open_store(str(folder / _name(source))).open(SAVED_AT)) for source in sources}
    largest = 0.0
    for target in targets:
        config = layout_config(target, SAVED_AT + GOES_ON)
        runs = [str(folder / _name(source)) for source in sources]
        again = str(folder / f"again-{_name(target)}")
        results = run_ranks(restore_and_go_on, config.parallel.workers, config, runs, again, SAVED_AT, MODEL)[0]
        for source, (digest_again, losses) in zip(sources, results, strict=True):
            assert digest_again == digests[source], f"{_name(source)} -> {_name(target)}: weights or moments changed"
            difference = max(abs(a - b) for a, b in zip(losses, undisturbed[source], strict=True))
            assert difference <= TOLERANCE, f"{_name(source)} -> {_name(target)}: a loss differs by {difference}"
            largest = max(largest, difference)
    return largest


def _name(layout: Layout) -> str:
    return "zero{}-tp{}-dp{}".format(*layout)


@pytest.mark.timeout(600)
def test_some_pairs_of_layouts_go_on_equal(tmp_path):
    """4 of the 256 pairs, each stage once as a source and a target; the seed is the pairs'."""
    rng = random.Random(4)
    sources, targets = rng.sample(range(4), 2), rng.sample(range(4), 2)
    compare(tmp_path, [(s, 2, rng.choice((1, 2))) for s in sources], [(t, rng.choice((1, 2)), 2) for t in targets])


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_every_pair_of_layouts_goes_on_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "TIMEOUT_S", 1800)  # one group of processes restores 16 checkpoints
    largest = compare(tmp_path, LAYOUTS, LAYOUTS)
    print(f"{len(LAYOUTS) ** 2} pairs, the largest difference of a loss {largest:.2g}")


# The frozen weights of the runs that restore are others until they are restored.
LORA = partial(on_lora, train_and_save, 0.0), partial(on_lora, restore_and_go_on, 0.01)
LORA_LAYOUTS = [layout for layout in LAYOUTS if layout[1] == 1]


@pytest.mark.timeout(600)
def test_some_pairs_of_layouts_go_on_equal_with_adapters(tmp_path):
    """8 of the 64 pairs: each stage is a source or a target, and the stages which hold frozen weights whole and in pieces are both."""
    compare(tmp_path, [(0, 1, 1), (3, 1, 2)], [(0, 1, 2), (1, 1, 2), (2, 1, 1), (3, 1, 2)], *LORA)
    for source in ("zero0-tp1-dp1", "zero3-tp1-dp2"):
        published = open_store(str(tmp_path / source)).open(SAVED_AT)
        kinds = [tensor.kind for tensor in read_index(published).tensors.values()]
        assert {kind: kinds.count(kind) for kind in kinds} == {"frozen": 21, "trained": 16, "buffer": 2}
        assert int(dict(read_full_weights(published))["base_model.model.model.layers.1.self_attn.calls"]) > 0


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_every_pair_of_layouts_goes_on_equal_with_adapters(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "TIMEOUT_S", 1800)
    largest = compare(tmp_path, LORA_LAYOUTS, LORA_LAYOUTS, *LORA)
    print(f"{len(LORA_LAYOUTS) ** 2} pairs, the largest difference of a loss {largest:.2g}")
