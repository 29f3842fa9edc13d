"""Groups of several learning rates through DeepSpeed: the same losses on every layout, also from another's checkpoint."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from llm.config import ModelSection, RunConfig
from llm.metrics import read_rows, rows_of
from tests.distributed.checkpoint_runs import MODEL, Layout, layout_config, train_run
from tests.distributed.layouts import Result, make_job, run_ranks, train_rank

# fp32 sums in another order; the steps of AdamW amplify the last bits.
TOLERANCE = 1e-4
STEPS, CUT = 8, 4
HALF = ModelSection(preset="llama_1m", mup_base_width=MODEL["hidden_size"] // 2)
LAYOUTS: list[Layout] = [(0, 1, 2), (1, 1, 2), (2, 1, 2), (3, 1, 2), (0, 2, 1), (1, 2, 2), (3, 2, 1)]


def config_of(layout: Layout, steps: int = STEPS, model: ModelSection = HALF) -> RunConfig:
    return layout_config(layout, steps).model_copy(update={"model": model})


@functools.cache
def losses(layout: Layout, model: ModelSection | None = None) -> Result:
    config = config_of(layout, model=model or HALF)
    return run_ranks(train_rank, config.parallel.workers, config, MODEL, 0)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_equal_one_process(layout):
    assert losses(layout).losses == pytest.approx(losses((0, 1, 1)).losses, abs=TOLERANCE)


def test_they_are_not_those_of_one_rate():
    plain = run_ranks(train_rank, 1, config_of((0, 1, 1), model=ModelSection(preset="llama_1m")), MODEL, 0)[0]
    assert max(abs(a - b) for a, b in zip(losses((0, 1, 1)).losses, plain.losses, strict=True)) > 100 * TOLERANCE


def _rates(rank: int, world_size: int, config: RunConfig) -> dict[str, list[float]]:
    """By kind of weight: what its learning rate was at the last update, as DeepSpeed's own optimizer has it."""
    from llm.checkpoint.fragments import Ownership
    from llm.parallel.mesh import Mesh
    from llm.train.build import build_engine

    engine = build_engine(make_job(config, MODEL), Mesh(rank, world_size, config.parallel.tensor))
    engine.backward(engine.forward(input_ids=_ids()).sum(), last=True)
    engine.step(0.5, lambda norm: True)
    inner: Any = engine.optimizer if engine.stage == 0 else engine.optimizer.optimizer
    found: dict[str, set[float]] = {}
    for fragment in Ownership(engine).fragments():
        if fragment.flat is None:
            continue
        kind = "embedding" if "embed" in fragment.name else "vector" if len(fragment.shape) == 1 else "scaled"
        group = next(group for group in inner.param_groups if any(fragment.flat is flat for flat in group["params"]))
        found.setdefault(kind, set()).add(group["lr"])
    return {kind: sorted(rates) for kind, rates in found.items()}


def _ids() -> Any:
    import torch

    return torch.arange(1, 9)[None]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_weight_is_updated_at_its_own_rate(stage):
    config = config_of((stage, 1, 1))
    lr = config.train.lr
    assert run_ranks(_rates, 1, config) == [{"embedding": [lr / 2], "vector": [lr / 2], "scaled": [lr / 4]}]


@pytest.mark.parametrize(("saved", "goes_on"), [((2, 1, 2), (3, 2, 1)), ((3, 1, 2), (1, 2, 2)), ((1, 2, 1), (0, 1, 2))])
def test_a_checkpoint_goes_on_in_another_layout(tmp_path, saved, goes_on):
    for folder, layout, steps in (("whole", (1, 1, 1), STEPS), ("cut", saved, CUT), ("cut", goes_on, STEPS)):
        config = config_of(layout, steps)
        run_ranks(train_run, config.parallel.workers, config, str(tmp_path / folder), MODEL)
    expected, resumed = (rows_of(read_rows(tmp_path / name / "metrics.jsonl"), "step") for name in ("whole", "cut"))
    assert [row["ledger"] for row in resumed] == [row["ledger"] for row in expected]
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in expected], abs=TOLERANCE)


def test_resumed_equals_uninterrupted(tmp_path):
    def run(steps: int, folder: str) -> list[str]:
        return run_ranks(train_run, 2, config_of((2, 1, 2), steps), str(tmp_path / folder), MODEL)

    expected = run(STEPS, "whole")
    run(CUT, "cut")
    assert run(STEPS, "cut") == expected
