"""metrics.jsonl: legal lines whatever the numbers, each step once after a restart, a tail that loses nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llm.errors import StorageError
from llm.metrics import (
    METRICS,
    MetricsTail,
    MetricsWriter,
    bits_per_token,
    eval_row,
    event_row,
    file_reader,
    read_rows,
    row_problems,
    rows_of,
    step_row,
)
from llm.metrics_file import UploadSink


def a_step(step: int, loss: float = 2.0, **changed) -> dict:
    values = {
        "tokens": 512 * step,
        "tokens_per_s": 1000.0,
        "data_wait_frac": 0.02,
        "lr": 1e-3,
        "grad_norm": 0.7,
        "step_s": 0.5,
    }
    values |= {"mfu": None, "elapsed_s": step * 0.5, "epoch": 0, "window": 1, "offset": 32 * step, "ledger": "0" * 32}
    return step_row(step=step, loss=loss, **(values | changed))


def steps(rows: list[dict]) -> list[int]:
    return [row["step"] for row in rows_of(rows, "step")]


def test_rows_are_legal_and_every_metric_says_unit_and_formula():
    assert row_problems(a_step(1)) == []
    assert row_problems(eval_row(step=0, eval_loss=math.log(8), eval_tokens=64)) == []
    assert row_problems(event_row("checkpoint", elapsed_s=1.0, step=1, path=Path("a"))) == []
    assert all(metric.unit and metric.formula and name == metric.name for name, metric in METRICS.items())


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"kind": "steps"}, "kind='steps' must be step, eval or event"),
        (a_step(1) | {"data_wait_frac": 2.0}, "data_wait_frac=2.0 must be at most 1"),
        (a_step(1) | {"step": 1.5}, "step=1.5 must be a whole number"),
        (a_step(1) | {"loss": None}, "loss must not be null"),
        (a_step(1) | {"losss": 1}, "losss is not a metric of a step row"),
        ({k: v for k, v in a_step(1).items() if k != "lr"}, "lr is missing"),
    ],
)
def test_an_illegal_row_is_named(row, problem):
    assert row_problems(row) == [problem]


def test_builders_refuse_our_own_mistakes():
    with pytest.raises(AssertionError, match="tokens=-1 must be at least 0"):
        a_step(1, tokens=-1)


def test_perplexity_and_bits():
    assert eval_row(step=0, eval_loss=math.log(8), eval_tokens=1)["perplexity"] == pytest.approx(8)
    assert bits_per_token(math.log(8)) == pytest.approx(3)
    overflow = eval_row(step=0, eval_loss=1000.0, eval_tokens=1)
    assert overflow["perplexity"] is None and overflow["nonfinite"] == ["perplexity"]


def test_nan_and_infinity_never_reach_the_file(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(a_step(1, loss=math.nan, grad_norm=math.inf))
        writer.write({"kind": "event", "event": "x", "elapsed_s": 0.0, "deep": {"a": [1.0, -math.inf]}})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines)
    assert first["loss"] is None and first["grad_norm"] is None and first["nonfinite"] == ["loss", "grad_norm"]
    assert second["deep"] == {"a": [1.0, None]} and second["nonfinite"] == ["deep.a.1"]
    assert row_problems(first) == []


def test_text_of_any_kind_stays_on_one_line(tmp_path):
    text = 'a\nb\r\u2028"\\ \x1b[31m \ud800'
    with MetricsWriter(tmp_path / "m") as writer:
        writer.write(event_row("sample", elapsed_s=1.0, text=text))
    (row,) = read_rows(tmp_path / "m")
    assert row["text"] == text.replace("\ud800", "?")


def test_truncation_leaves_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(1, 8):
            writer.write(a_step(step))
        writer.write(eval_row(step=4, eval_loss=1.0, eval_tokens=1))
        writer.write(eval_row(step=6, eval_loss=1.0, eval_tokens=1))
        writer.write(event_row("checkpoint", elapsed_s=1.0, step=6))
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "st')  # killed while it wrote
    with MetricsWriter(path) as writer:
        assert writer.truncate_after(4) == 4
        writer.write(event_row("restart", elapsed_s=0.0, step=4))
        for step in range(5, 9):
            writer.write(a_step(step))
    rows = read_rows(path)
    assert steps(rows) == list(range(1, 9))
    assert [row["step"] for row in rows_of(rows, "eval")] == [4]
    assert [row["event"] for row in rows_of(rows, "event")] == ["checkpoint", "restart"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_half_written_line_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "event", "event": "start", "elapsed_s": 0}\n{"kind":')
    with MetricsWriter(path) as writer:
        writer.write(a_step(1))
    assert [row["kind"] for row in read_rows(path)] == ["event", "step"]


def test_the_tail_waits_for_the_file_and_for_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(file_reader(path))
    assert tail.poll() == []
    line = json.dumps(a_step(1)).encode() + b"\n"
    path.write_bytes(line + line[:20])
    assert steps(tail.poll()) == [1]
    assert tail.poll() == []
    path.write_bytes(line + line.replace(b'"step": 1,', b'"step": 2,') + b"not json\n[1]\n")
    assert steps(tail.poll()) == [2]
    assert tail.num_bad_lines == 2


@pytest.mark.parametrize("more", [0, 1, 30])
def test_the_tail_sees_a_restart_even_when_the_file_has_grown_past_it_again(tmp_path, more):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(file_reader(path))
    with MetricsWriter(path) as writer:
        for step in range(1, 11):
            writer.write(a_step(step))
        assert steps(tail.poll()) == list(range(1, 11))
        writer.truncate_after(6)
        for step in range(7, 7 + more):
            writer.write(a_step(step, loss=1.5))
        assert steps(tail.poll()) == list(range(7, 7 + more))
        writer.write(a_step(7 + more))
        assert steps(tail.poll()) == [7 + more]


def test_the_tail_survives_a_file_that_vanishes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(a_step(1))
    tail, data = MetricsTail(file_reader(path)), path.read_bytes()
    assert steps(tail.poll()) == [1]
    path.unlink()
    assert tail.poll() == []
    path.write_bytes(data + data.replace(b'"step": 1,', b'"step": 2,'))
    assert steps(tail.poll()) == [2]


class ABucket:
    def __init__(self) -> None:
        self.data, self.fail, self.was_put = b"", False, threading.Event()

    def put(self, data: bytes) -> None:
        if self.fail:
            raise ConnectionError("no route to the bucket")
        self.data = data
        self.was_put.set()


def test_an_uploaded_file_is_put_while_it_grows_and_whole_at_the_end():
    bucket = ABucket()
    tail = MetricsTail(lambda offset: bucket.data[offset:])
    writer = MetricsWriter(UploadSink(lambda: bucket.data, bucket.put, every_s=0.01))
    writer.write(a_step(1))
    assert bucket.was_put.wait(5)
    assert steps(tail.poll()) == [1]
    writer.write(a_step(2))
    writer.close()
    assert steps(tail.poll()) == [2]
    again = MetricsWriter(UploadSink(lambda: bucket.data, bucket.put))
    assert again.truncate_after(1) == 1
    again.close()
    assert bucket.data.count(b"\n") == 1


def test_a_failed_upload_ends_no_training_but_is_told_at_the_end():
    bucket = ABucket()
    bucket.fail = True
    writer = MetricsWriter(UploadSink(lambda: b"", bucket.put, every_s=0.01))
    writer.write(a_step(1))
    with pytest.raises(StorageError, match="no route to the bucket"):
        writer.close()


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be opened"):
        MetricsWriter(tmp_path / "file" / "metrics.jsonl")


def test_the_observing_side_imports_no_framework():
    heavy = ["torch", "transformers", "ray", "deepspeed", "matplotlib", "tensorboard", "mlflow", "wandb"]
    code = "import sys, llm.metrics, llm.observe.progress, llm.observe.sinks, llm.observe.report, llm.observe.quiet;"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
