"""Through real Ray: a worker finds the newest checkpoint damaged while it restores; the run goes on from the one before it by itself, and
the stream, which had begun at the newest one's cursor already, begins anew."""

from __future__ import annotations

import pytest

from llm.metrics import read_rows, rows_of
from tests.distributed.checkpoint_runs import damage
from tests.small_run import start_run


@pytest.mark.faults
@pytest.mark.timeout(1200)  # three runs; a minute each where the machine is idle
def test_the_stream_follows_back_to_the_older_checkpoint(recipe):
    run = recipe.parent / "runs"
    overrides = ("parallel.workers=2", "train.schedule=constant", "export.enabled=false", "checkpoint.every_steps=2", "eval.every_steps=0")
    for name, steps in (("whole", 8), ("cut", 6)):
        process = start_run(recipe, *overrides, f"run.name={name}", f"train.steps={steps}")
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-3000:]
    damage(run / "cut" / "checkpoints" / "step-00000006" / "rank-00001.safetensors")
    process = start_run(recipe, *overrides, "run.name=cut", "train.steps=8")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    whole, cut = (read_rows(run / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert [row["step"] for row in rows_of(cut, "event", "damaged")] == [6]
    assert [row["step"] for row in rows_of(cut, "event", "restart")] == [4]
    assert [(row["step"], row["ledger"], row["loss"]) for row in rows_of(cut, "step")] == [
        (row["step"], row["ledger"], row["loss"]) for row in rows_of(whole, "step")
    ]
    assert len(list((run / "cut" / "checkpoints").glob("step-00000006*"))) == 2, "the damaged one is set aside, not removed"
