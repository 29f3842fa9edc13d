"""A batch that changes its size from step to step: the gradient is that of the whole batch, whatever the number of microbatches, and a run
that is cut in mid-schedule goes on with another data size as if nothing had been.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from llm.data.ledger import START, advanced, row_digests
from llm.metrics import read_rows, rows_of
from tests.distributed.checkpoint_runs import MODEL, Layout, layout_config, train_run
from tests.distributed.layouts import llama, make_config, run_layout, run_ranks, unequal_rows

# fp32 sums in another order; the steps of AdamW amplify the last bits.
TOLERANCE = 1e-4
STEPS, CUT = 9, 4
SCHEDULE = [{"from_step": 2, "rows": 16}, {"from_step": 5, "rows": 24}, {"from_step": 7, "rows": 8}]
ROWS = [8, 8, 16, 16, 16, 24, 24, 8, 8]
TRAIN = {"batch_rows": 8, "batch_schedule": SCHEDULE}


@functools.cache
def whole_batches():
    """One process that sees every batch in one forward pass: nothing is accumulated."""
    config = make_config(train={**TRAIN, "steps": STEPS})
    assert [config.microbatch_rows_at(step) for step in range(STEPS)] == ROWS
    return run_layout(config, llama())


@pytest.mark.parametrize(("parallel", "microbatch_rows"), [
    ({"workers": 1, "zero_stage": 0}, 1),
    ({"workers": 2, "zero_stage": 0}, 4),
    ({"workers": 2, "zero_stage": 1}, 2),
    ({"workers": 2, "zero_stage": 2}, "auto"),
    ({"workers": 2, "zero_stage": 2, "offload": "optimizer"}, 2),
    ({"workers": 2, "zero_stage": 3}, 2),
    ({"workers": 4, "tensor": 2, "zero_stage": 1}, 2),
])  # fmt: skip
def test_a_varying_number_of_unequally_masked_microbatches_gives_the_gradient_of_the_whole_batch(parallel, microbatch_rows):
    result, expected = (
        run_layout(make_config(train={**TRAIN, "steps": STEPS, "microbatch_rows": microbatch_rows}, parallel=parallel), llama()),
        whole_batches(),
    )
    assert result.losses == pytest.approx(expected.losses, abs=TOLERANCE)
    assert result.grad_norms == pytest.approx(expected.grad_norms, rel=1e-3)
    assert result.extra == expected.extra  # tokens counted, the cursor and the ledger after the last batch


def test_the_ledger_and_the_cursor_are_those_of_the_cuts_between_the_steps():
    """The sequences are those of a constant batch, one after the other."""
    ids, segments = unequal_rows(sum(ROWS), 16)
    ledger = START
    for stop, rows in zip(np.cumsum(ROWS), ROWS, strict=True):
        ledger = advanced(ledger, row_digests(ids[stop - rows : stop], segments[stop - rows : stop]), "")
    found = whole_batches().extra
    assert found["ledger"] == ledger
    assert found["cursor"].offset == sum(ROWS)


def run(layout: Layout, steps: int, folder) -> list[str]:
    config = layout_config(layout, steps, batch_rows=8, batch_schedule=SCHEDULE)
    return run_ranks(train_run, config.parallel.workers, config, str(folder), MODEL)


@pytest.mark.parametrize(("saved", "goes_on"), [((1, 1, 2), (3, 1, 1)), ((2, 1, 1), (1, 2, 2))])
def test_a_resume_in_mid_schedule_with_another_data_size_equals_the_undisturbed_run(tmp_path, saved, goes_on):
    run((1, 1, 1), STEPS, tmp_path / "whole")
    run(saved, CUT, tmp_path / "cut")
    run(goes_on, STEPS, tmp_path / "cut")
    expected, resumed = (rows_of(read_rows(tmp_path / name / "metrics.jsonl"), "step") for name in ("whole", "cut"))
    assert [row["offset"] for row in expected] == np.cumsum(ROWS).tolist()
    assert [row["ledger"] for row in resumed] == [row["ledger"] for row in expected]
    assert [row["tokens"] for row in resumed] == [row["tokens"] for row in expected]
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in expected], abs=TOLERANCE)


def test_the_learning_rate_that_is_used_and_recorded_follows_each_batch(tmp_path):
    """SGD, whose update is linear in the rate: by the linear rule as with the rate that it comes to."""
    train: dict[str, Any] = {"batch_rows": 16, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    runs: dict[str, dict[str, Any]] = {"ruled": {"lr": 0.1, "lr_batch_rule": "linear", "lr_batch_rows": 8}, "plain": {"lr": 0.2}}
    for name, rates in runs.items():
        run_ranks(train_run, 2, layout_config((1, 1, 2), STEPS, **train, **rates), str(tmp_path / name), MODEL)
    ruled, plain = (
        [(row["loss"], row["lr"]) for row in rows_of(read_rows(tmp_path / name / "metrics.jsonl"), "step")] for name in ("ruled", "plain")
    )
    assert ruled == plain
    scheduled = layout_config(
        (1, 1, 1), STEPS, batch_rows=8, batch_schedule=SCHEDULE, lr=0.1, lr_batch_rule="sqrt", lr_batch_rows=8, warmup_steps=0
    )
    run_ranks(train_run, 1, scheduled, str(tmp_path / "scheduled"), MODEL)
    rows = rows_of(read_rows(tmp_path / "scheduled" / "metrics.jsonl"), "step")
    assert [row["lr"] for row in rows] == pytest.approx([0.1 * (n / 8) ** 0.5 for n in ROWS])


def test_the_same_layout_ends_bit_for_bit_as_the_undisturbed_run(tmp_path):
    expected = run((2, 1, 2), STEPS, tmp_path / "whole")
    run((2, 1, 2), CUT, tmp_path / "cut")
    assert run((2, 1, 2), STEPS, tmp_path / "cut") == expected
