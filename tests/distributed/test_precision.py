"""bf16 and Muon on every ZeRO stage: bf16 learns what fp32 does, within its rounding; Muon learns the same on all of them."""

from __future__ import annotations

import functools

import pytest
import torch

from llm.errors import ConfigError
from tests.distributed.layouts import llama, make_config, run_layout

MODEL = llama()


@functools.cache
def fp32_losses() -> list[float]:
    return run_layout(make_config(train={"microbatch_rows": 2}), MODEL).losses


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_bf16_follows_fp32(workers, stage):
    config = make_config(parallel={"workers": workers, "zero_stage": stage}, train={"microbatch_rows": 2, "precision": "bf16"})
    losses = run_layout(config, MODEL).losses
    # bf16 keeps 8 bits of a number, so a loss of 4.5 is known to 0.02.
    assert losses[0] == pytest.approx(fp32_losses()[0], abs=0.03)
    assert losses == pytest.approx(fp32_losses(), abs=0.1)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("key", "value", "told"), [
    ("precision", "fp16", r"train\.precision=fp16 needs a GPU.*Nearest legal values: bf16"),
    ("compile", True, r"train\.compile=true needs a GPU.*Nearest legal value: false"),
])  # fmt: skip
def test_what_needs_a_gpu_is_refused_by_name_without_one(key, value, told):
    with pytest.raises(ConfigError, match=told):
        run_layout(make_config(train={"microbatch_rows": 2, key: value}), MODEL)


@pytest.mark.parametrize(("workers", "stage"), [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_muon_learns_and_is_the_same_on_every_stage(workers, stage):
    train = {"microbatch_rows": 2, "optimizer": "muon"}
    losses = run_layout(make_config(parallel={"workers": workers, "zero_stage": stage}, train=train), MODEL).losses
    assert losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(muon_alone(), abs=1e-2)  # its Newton-Schulz iteration runs in bf16


@functools.cache
def muon_alone() -> list[float]:
    return run_layout(make_config(train={"microbatch_rows": 2, "optimizer": "muon"}), MODEL).losses
