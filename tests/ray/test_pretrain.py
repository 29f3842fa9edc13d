"""The main job through real Ray, as a user runs it: a process of its own, ended by its exit code."""

from __future__ import annotations

import signal
import time

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.checkpoints import main as checkpoints
from jobs.export import main as export
from llm.metrics import read_rows, rows_of
from tests.small_run import start_run


def test_four_workers_train_export_and_resume(recipe):
    """TP 2 x DP 2 with ZeRO 1 on however many cores there are; then the same command with more steps goes on from the checkpoint."""
    overrides = ("parallel.workers=4", "parallel.tensor=2", "train.schedule=constant")
    first = start_run(recipe, *overrides)
    out, err = first.communicate(timeout=400)
    assert first.returncode == 0, err[-3000:]
    run = recipe.parent / "runs" / "small"
    rows = read_rows(run / "metrics.jsonl")
    steps, evals = rows_of(rows, "step"), rows_of(rows, "eval")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in evals] == [0, 3, 6]
    assert evals[-1]["eval_loss"] < evals[0]["eval_loss"]
    assert rows_of(rows, "event", "export")[0]["max_logit_difference"] < 1e-4
    assert (run / "report.html").stat().st_size > 10_000
    assert list((run / "tensorboard").iterdir()) and list((run / "quarantine").iterdir())
    assert "small" in str(run) and "step 6/6" in out

    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    ids = tokenizer("sentence 5 speaks", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()

    assert checkpoints(["ls", "--run", str(run)]) == checkpoints(["verify", "--run", str(run)]) == 0
    assert checkpoints(["inspect", "--run", str(run)]) == checkpoints(["digest", "--run", str(run), "--step", "3"]) == 0
    assert export(["--run", str(run), "--to", str(run / "again")]) == 0
    again = AutoModelForCausalLM.from_pretrained(run / "again")
    assert torch.equal(again(ids).logits, model(ids).logits)

    second = start_run(recipe, *overrides, "train.steps=8")
    _, err = second.communicate(timeout=400)
    assert second.returncode == 0, err[-3000:]
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows_of(rows, "step")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows_of(rows, "event", "restart")[0]["step"] == 6

    third = start_run(recipe, *overrides, "train.steps=8")
    out, _ = third.communicate(timeout=60)
    assert third.returncode == 0 and "is finished" in out


@pytest.mark.parametrize("after_s", [0.3, 4.0])
def test_sigterm_while_it_starts_ends_the_run_quietly(recipe, after_s):
    process = start_run(recipe)
    time.sleep(after_s)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in err and "***" not in err


def test_ctrl_c_ends_the_run_within_ten_seconds_and_leaves_no_process(recipe):
    process = start_run(recipe, "train.steps=100000", "eval.every_steps=0")
    metrics = recipe.parent / "runs" / "small" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not rows_of(read_rows(metrics), "step"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130, err[-3000:]
    assert "interrupted" in err and "Traceback" not in err
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
