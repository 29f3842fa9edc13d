"""The hooks see each microbatch's gradient before it is reduced, on every layout, and the noise scale does not depend on the layout."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from llm.train.tune.noise_scale import StepNorms, estimate
from tests.distributed.layouts import Given, blocks_of, llama, make_config, make_job, run_ranks, unequal_rows

STEPS, ROWS, MICROBATCH = 3, 8, 2
LAYOUTS = {  # workers, tensor, zero stage
    "zero0_dp2": (2, 1, 0),
    "zero1_dp2": (2, 1, 1),
    "zero2_dp2": (2, 1, 2),
    "zero3_dp2": (2, 1, 3),
    "zero1_tp2": (2, 2, 1),
    "zero1_tp2_dp2": (4, 2, 1),
}


def measure_rank(rank: int, world_size: int, config: Any, run_uri: str, seed: int) -> list[StepNorms]:
    from dataclasses import replace

    from llm.parallel.mesh import Mesh
    from llm.state import TrainState
    from llm.train.tune.noise_run import measure_noise
    from llm.train.tune.norms_file import read_norms
    from llm.train.watchdog import Unwatched

    mesh = Mesh(rank, world_size, config.parallel.tensor)
    job = replace(make_job(config, llama(), run_uri), noise_steps=config.train.steps)
    ids, segments = unequal_rows(config.train.steps * config.train.batch_rows, config.data.seq_len, seed)
    reader = None if mesh.tensor_rank else Given(blocks_of(ids, segments, config.rank_rows, mesh.data_rank, mesh.data_size))
    measure_noise(job, mesh, reader, TrainState(), Unwatched())
    return read_norms(job)


def plain_rank(rank: int, world_size: int, config: Any, seed: int) -> list[StepNorms]:
    """The same by autograd alone, the weights moved by the engine's own steps: each microbatch's gradient by itself."""
    import torch

    from llm.model.loss import model_inputs, sum_loss
    from llm.parallel.mesh import Mesh
    from llm.train.build import build_engine
    from llm.train.schedule import lr_factor

    engine = build_engine(make_job(config, llama()), Mesh(0, 1, 1))
    parameters = list(engine.module.parameters())
    ids, segments = (torch.from_numpy(part) for part in unequal_rows(config.train.steps * ROWS, config.data.seq_len, seed))
    found = []
    for step in range(config.train.steps):
        small, big, counts = 0.0, [torch.zeros_like(p) for p in parameters], []
        for first in range(step * ROWS, (step + 1) * ROWS, MICROBATCH):
            rows = slice(first, first + MICROBATCH)
            inputs, labels, valid = model_inputs(ids[rows], segments[rows], False)
            gradient = torch.autograd.grad(sum_loss(engine.module(**inputs).logits, labels, valid), parameters)
            counts.append(int(valid.sum()))
            small += sum(float(g.pow(2).sum()) for g in gradient)
            big = [b + g for b, g in zip(big, gradient, strict=True)]
        total = sum(counts)
        square = sum(float(b.pow(2).sum()) for b in big) / total**2
        counted = sum(count**2 for count in counts)
        found.append(StepNorms(step + 1, small / counted, square, counted / total, total))
        for parameter, gradient in zip(parameters, big, strict=True):
            clip = min(1.0, config.train.grad_clip / (square**0.5 + 1e-6))
            with torch.no_grad():
                parameter -= config.train.lr * lr_factor(config.train, step) * clip * gradient / total
    return found


def sgd(**parallel: Any) -> Any:
    train = {"steps": STEPS, "microbatch_rows": MICROBATCH, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.05}
    return make_config(parallel={"zero_stage": 0, **parallel}, train=train)


@functools.cache
def plain() -> list[StepNorms]:
    return run_ranks(plain_rank, 1, sgd(), 0)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_equal_those_of_autograd_alone(layout, tmp_path):
    workers, tensor, stage = LAYOUTS[layout]
    config = sgd(workers=workers, tensor=tensor, zero_stage=stage)
    found = run_ranks(measure_rank, workers, config, str(tmp_path), 0)[0]
    assert len(found) == STEPS
    for norms, reference in zip(found, plain(), strict=True):
        assert (norms.step, norms.big_tokens) == (reference.step, reference.big_tokens)
        assert norms.small_tokens == pytest.approx(reference.small_tokens)
        assert norms.small_square == pytest.approx(reference.small_square, rel=1e-3)
        assert norms.big_square == pytest.approx(reference.big_square, rel=1e-3)
        assert norms.small_square > 1.05 * norms.big_square  # else nothing has been measured


def test_the_noise_scale_is_the_same_at_data_sizes_2_and_4_within_its_interval(tmp_path):
    """Other data, other microbatches, other accumulation: only the model and the stream's distribution are the same."""
    scales = []
    for workers, rows in ((2, 4), (4, 1)):
        train = {"steps": 40, "batch_rows": 16, "microbatch_rows": rows, "lr": 1e-4}
        config = make_config(parallel={"workers": workers, "zero_stage": 2}, train=train)
        folder = tmp_path / str(workers)
        folder.mkdir()
        scale = estimate(run_ranks(measure_rank, workers, config, str(folder), workers)[0])
        assert scale is not None and scale.steps == 40
        scales.append(scale)
    two, four = scales
    assert two.low_tokens <= four.tokens <= two.high_tokens and four.low_tokens <= two.tokens <= four.high_tokens
    assert two.high_tokens < 3 * two.low_tokens  # an interval that says something
