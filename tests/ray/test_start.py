"""A run in parts, and one that starts from another's checkpoint, as their user runs them."""

from __future__ import annotations

import subprocess

import pytest
import yaml

from llm.metrics import read_rows, rows_of
from tests.small_run import start_run


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, err[-3000:]
    return out, err


@pytest.mark.faults
def test_a_paused_run_says_so_and_another_starts_from_its_checkpoint_in_another_layout(recipe):
    runs = recipe.parent / "runs"
    out, _ = finish(start_run(recipe, "train.until_step=3", "eval.every_steps=0"))
    assert "paused" in out and not (runs / "small" / "export").exists()
    out, _ = finish(start_run(recipe, "train.until_step=3", "eval.every_steps=0"))
    assert "has come to train.until_step=3: nothing to do" in out
    start = "checkpoint.start_from=runs/small/checkpoints/step-00000003"
    _, err = finish(start_run(recipe, "run.name=other", start, "data.seq_len=16"), 2)
    assert "data.seq_len: 32 -> 16" in err
    layout = ("parallel.workers=2", "parallel.zero_stage=3", "eval.every_steps=0")
    out, _ = finish(start_run(recipe, "run.name=other", start, "train.lr=5.0e-3", *layout))
    assert (runs / "other" / "export" / "model.safetensors").exists()
    rows = read_rows(runs / "other" / "metrics.jsonl")
    assert [row["step"] for row in rows_of(rows, "step")] == [4, 5, 6]
    assert [row["step"] for row in rows_of(rows, "event", "started")] == [3]
    finish(start_run(recipe, "eval.every_steps=0"))
    whole = rows_of(read_rows(runs / "small" / "metrics.jsonl"), "step")
    assert [row["ledger"] for row in whole[3:]] == [row["ledger"] for row in rows_of(rows, "step")], "the same rows, whatever the rest"
    assert whole[3]["loss"] == pytest.approx(rows_of(rows, "step")[0]["loss"], abs=1e-5), "of the same weights"
    assert yaml.safe_load((runs / "small" / "config.yaml").read_text())["train"]["until_step"] is None
