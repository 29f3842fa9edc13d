"""What a run was trained on, through the whole stack: the ledger is the same after kill -9 and a resume with other workers, across changes
of the mixture and of the batch size; one changed byte shows, and `jobs.trace` finds the step.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from jobs.trace import main as trace
from llm.metrics import read_rows, rows_of
from tests.small_run import start_run

STEPS = 14
ORDER = (
    "data.sources=[{name: even, uri: 'corpus/[02].jsonl', weight: 0.8}, {name: odd, uri: 'corpus/[13].jsonl', weight: 0.2}]",
    "data.schedule=[{from_step: 5, weights: {odd: 1.0}}]",
    "train.batch_schedule=[{from_step: 4, rows: 16}, {from_step: 7, rows: 24}, {from_step: 11, rows: 8}]",
    "data.slice_bytes=4096",
    "data.window_slices=2",
    "checkpoint.every_steps=3",
    "eval.rows=0",
    "export.enabled=false",
    "train.schedule=constant",
    f"train.steps={STEPS}",
)


def finish(process) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]


def ledgers(run: Path) -> list[str]:
    return [row["ledger"] for row in rows_of(read_rows(run / "metrics.jsonl"), "step")]


def kill_all(process) -> None:
    """Of Ray's processes some outlive a killed driver for a minute: all of this run's are killed with it."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            os.kill(each.pid, signal.SIGKILL)
    psutil.wait_procs(family, timeout=10)
    process.communicate()


@pytest.fixture
def undisturbed(recipe: Path) -> Path:
    finish(start_run(recipe, *ORDER, "run.name=one"))
    return recipe.parent / "runs" / "one"


def test_the_ledger_survives_kill_9_and_other_workers_and_shows_one_changed_byte(recipe, undisturbed, capsys, monkeypatch):
    expected = ledgers(undisturbed)
    assert len(expected) == STEPS and len(set(expected)) == STEPS
    tokens = [0, *(row["tokens"] for row in rows_of(read_rows(undisturbed / "metrics.jsonl"), "step"))]
    # A row predicts up to 32 tokens, and most predict nearly all.
    assert [round((after - before) / 32 / 8) for before, after in pairwise(tokens)] == [1] * 4 + [2] * 3 + [3] * 4 + [1] * 3

    two = recipe.parent / "runs" / "two"
    process = start_run(recipe, *ORDER, "run.name=two", "parallel.workers=2", "parallel.zero_stage=2")
    deadline = time.monotonic() + 200
    while len(rows_of(read_rows(two / "metrics.jsonl"), "step")) < 8:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    kill_all(process)
    finish(start_run(recipe, *ORDER, "run.name=two", "parallel.workers=4", "parallel.tensor=1", "parallel.zero_stage=1"))
    assert ledgers(two) == expected
    assert rows_of(read_rows(two / "metrics.jsonl"), "event", "restart")[-1]["step"] in (6, 9, 12)

    monkeypatch.chdir(recipe.parent)
    assert trace(["--run", "runs/two", "--verify"]) == 0
    assert f"steps 1 to {STEPS}" in capsys.readouterr().out
    # From step 6 on, in the first block that was not begun, only `odd` is read.
    assert trace(["--run", "runs/two", "--step", "1"]) == 0
    first = [line.split()[2] for line in capsys.readouterr().out.splitlines()[3:]]
    assert any(name.endswith(("0.jsonl", "2.jsonl")) for name in first)

    # One byte of a document of step 3, the file's size as before.
    assert trace(["--run", "runs/one", "--step", "3"]) == 0
    _, _, uri, position, _ = capsys.readouterr().out.splitlines()[3].split()
    data = bytearray(Path(uri).read_bytes())
    line = data[int(position) :].split(b"\n", 1)[0]
    text = json.loads(line)["text"]
    changed = line.replace(text.encode(), (("z" if text[0] != "z" else "y") + text[1:]).encode())
    data[int(position) : int(position) + len(line)] = changed
    Path(uri).write_bytes(data)
    assert trace(["--run", "runs/one", "--verify"]) == 1
    out, err = capsys.readouterr()
    step = int(out.split()[1].rstrip(":"))
    assert step <= 3 and uri in out and "another modification time" in err

    resumed = start_run(recipe, *ORDER, "run.name=one", "train.steps=16")
    _, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 2 and uri in err and "started on other data" in err

    finish(start_run(recipe, *ORDER, "run.name=three"))
    assert ledgers(recipe.parent / "runs" / "three")[step - 2 : step - 1] == expected[step - 2 : step - 1]
    assert trace(["--run", "runs/three", "--against", "runs/one"]) == 1
    assert f"the ledgers part at step {step}" in capsys.readouterr().out
