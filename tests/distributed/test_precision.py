"""Mixed precision and Muon on every ZeRO stage: they learn what fp32 AdamW learns, within their rounding."""

from __future__ import annotations

import functools

import pytest

from tests.distributed.layouts import llama, make_config, run_layout

MODEL = llama()


@functools.cache
def fp32_losses() -> list[float]:
    return run_layout(make_config(train={"microbatch_rows": 2}), MODEL).losses


@pytest.mark.parametrize(("precision", "workers", "stage"), [
    ("bf16", 1, 0), ("bf16", 2, 0), ("bf16", 2, 1), ("bf16", 2, 2), ("bf16", 2, 3), ("fp16", 2, 1), ("fp16", 2, 2), ("fp16", 2, 3),
])  # fmt: skip
def test_half_precision_follows_fp32(precision, workers, stage):
    config = make_config(parallel={"workers": workers, "zero_stage": stage}, train={"microbatch_rows": 2, "precision": precision})
    losses = run_layout(config, MODEL).losses
    # bf16 keeps 8 bits of a number, so a loss of 4.5 is known to 0.02; fp16 leaves out the first steps until its loss scale fits.
    assert losses[0] == pytest.approx(fp32_losses()[0], abs=0.03)
    assert losses[-1] < losses[0] - 0.1
    if precision == "bf16":
        assert losses == pytest.approx(fp32_losses(), abs=0.1)


@pytest.mark.parametrize(("workers", "stage"), [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_muon_learns_and_is_the_same_on_every_stage(workers, stage):
    train = {"microbatch_rows": 2, "optimizer": "muon"}
    losses = run_layout(make_config(parallel={"workers": workers, "zero_stage": stage}, train=train), MODEL).losses
    assert losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(muon_alone(), abs=1e-2)  # its Newton-Schulz iteration runs in bf16


@functools.cache
def muon_alone() -> list[float]:
    return run_layout(make_config(train={"microbatch_rows": 2, "optimizer": "muon"}), MODEL).losses
