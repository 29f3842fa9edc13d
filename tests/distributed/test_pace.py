"""A slow rank is named by its own time also where its forward passes wait for the others' weights, at ZeRO stage 3."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from llm.metrics import read_rows, rows_of
from llm.train.pace import SLOW_BATCHES
from tests.distributed.checkpoint_runs import layout_config, train_run
from tests.distributed.layouts import llama, run_ranks

# DeepSpeed keeps weights of up to 100,000 elements on all ranks: the matrices between are larger, and gathered in every pass.
MODEL = llama(vocab_size=97, intermediate_size=4096)
SLEEP_S = 0.05


def _train(rank: int, world_size: int, config: Any, run_uri: str, slow_rank: int) -> None:
    """A run in which the first layer's MLP takes SLEEP_S more on `slow_rank`.

    DeepSpeed gathers the next 50 million weights ahead, which here are all, and no rank would wait for another: so it does not.
    """
    from llm.parallel import zero
    from llm.train import loop, pace

    pace.LEAST_US = 100  # on a fast core the tiny model's forward pass is shorter than what counts elsewhere
    build, engine_config = loop.build_engine, zero.engine_config

    def without_prefetch(*args: Any, **options: Any) -> dict[str, Any]:
        settings = engine_config(*args, **options)
        settings["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
        return settings

    def build_engine(*args: Any) -> Any:
        engine = build(*args)
        layer: Any = engine.module.get_submodule("model.layers.0.mlp.up_proj")
        assert engine.stage < 3 or not layer.weight.ds_persist, "its weight is not gathered: nothing is tested"
        if rank == slow_rank:
            layer.register_forward_hook(lambda *_: time.sleep(SLEEP_S))
        return engine

    loop.build_engine, zero.engine_config = build_engine, without_prefetch
    train_run(rank, world_size, config, run_uri, MODEL)


def slow_ranks(layout: tuple[int, int, int], folder: Path, slow_rank: int, **train: Any) -> list[int]:
    config = layout_config(layout, SLOW_BATCHES + 10, **train)
    run_ranks(_train, config.parallel.workers, config, str(folder), slow_rank)
    return [row["rank"] for row in rows_of(read_rows(folder / "metrics.jsonl"), "event", "slow_rank")]


@pytest.mark.parametrize(("stage", "recomputes", "slow_rank"), [(1, False, 1), (3, False, 0), (3, False, 1), (3, True, 1)])
def test_the_rank_that_computes_slowly_is_named(tmp_path, stage, recomputes, slow_rank):
    assert slow_ranks((stage, 1, 2), tmp_path, slow_rank, activation_checkpointing=recomputes) == [slow_rank]


def test_nobody_is_named_in_an_undisturbed_run_of_stage_3(tmp_path):
    assert slow_ranks((3, 1, 2), tmp_path, slow_rank=-1) == []
