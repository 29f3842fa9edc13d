"""report.html stands alone, escapes what a model may generate, and exists also for a run that never made a step."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import pytest

from llm.errors import StorageError
from llm.metrics import MetricsWriter, eval_row, event_row, rows_of, step_row
from llm.observe.charts import MAX_POINTS, _thin, smoothed
from llm.observe.report import write_report
from llm.observe.summary import summarize, without_redone


def rows_of_a_run(num_steps: int) -> list[dict]:
    rows = [
        event_row("phase", elapsed_s=3.0, name="building the model", phase_s=3.0),
        eval_row(step=0, eval_loss=8.3, eval_tokens=64),
    ]
    for step in range(1, num_steps + 1):
        loss = math.nan if step == 5 else 3 + 5 * math.exp(-step / 40)
        rows.append(
            step_row(step=step, loss=loss, tokens=512 * step, tokens_per_s=1000, data_wait_frac=0.01, lr=1e-3,
                     grad_norm=1.0, step_s=0.5, mfu=None, elapsed_s=3 + step / 2, epoch=0, window=0, offset=step, ledger="0" * 32)
        )  # fmt: skip
    rows.append(event_row("restart", elapsed_s=9.0, step=num_steps // 2))
    rows.append(eval_row(step=num_steps, eval_loss=3.2, eval_tokens=64))
    return [*rows, event_row("sample", elapsed_s=9, prompt="<b>The", text=" </pre><script src=http://x/>'\"&\x00 end")]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("num_steps", [10, 60])
def test_a_report_stands_alone_and_escapes_generated_text(tmp_path, num_steps):
    with MetricsWriter(tmp_path / "run-a" / "metrics.jsonl") as writer:
        for row in rows_of_a_run(num_steps):
            writer.write(row)
    config = {
        "run": {"name": "tiny<1>"},
        "train": {"lr": 0.001},
        "s3": {"endpoint_url": "https://me:hunter2@s3.example"},
    }
    out = write_report(tmp_path / "run-a", tmp_path / "out", config=config, phases={"starting Ray": 6.1})
    assert out == tmp_path / "out" / "report.html"
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = Page(out.read_text(encoding="utf-8"))
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "svg")]
    loads = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert len(loads) == 2 and all(value and value.startswith("data:image/png;base64,") for value in loads)
    assert "<b>The </pre><script src=http://x/>'\"&\ufffd end" in page.text
    for part in ("tiny<1>", "starting Ray", "6.1 s", "building the model", "8.3000 nats", "3.2000 nats", "train.lr"):
        assert part in page.text, part
    assert "hunter2" not in out.read_text()


def test_a_run_without_a_step_has_a_report_and_no_picture(tmp_path):
    out = write_report([event_row("end", elapsed_s=2.0, status="failed", error="<no data>")], tmp_path)
    assert "failed: <no data>" in Page(out.read_text()).text
    assert not (tmp_path / "loss.png").exists()
    assert write_report(tmp_path / "nothing", tmp_path, title="t").exists()


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="report cannot be written"):
        write_report([], tmp_path / "file")


def test_a_step_that_was_done_again_counts_once():
    def a_step(step: int, elapsed_s: float) -> dict:
        return step_row(step=step, loss=elapsed_s, tokens=step, tokens_per_s=1, data_wait_frac=0, lr=1, grad_norm=1,
                        step_s=1, mfu=None, elapsed_s=elapsed_s, epoch=0, window=0, offset=step, ledger="0" * 32)  # fmt: skip

    rows = [a_step(step, float(step)) for step in range(1, 8)] + [eval_row(step=s, eval_loss=1.0, eval_tokens=1) for s in (4, 6)]
    rows += [
        event_row("end", elapsed_s=8.0, status="failed"),
        event_row("restart", elapsed_s=0.5, step=4),
        a_step(5, 2.0),
    ]
    kept = without_redone(rows)
    assert [(row["step"], row["elapsed_s"]) for row in rows_of(kept, "step")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 2),
    ]
    assert [row["step"] for row in rows_of(kept, "eval")] == [4]
    summary = summarize(rows)
    assert (summary.steps, summary.elapsed_s, summary.status, summary.restarts) == (5, 10.0, "running", 1)


def test_smoothing_neither_lags_nor_is_spoiled_by_nan():
    line = [float(i) for i in range(300)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([2.0] * 200) == pytest.approx([2.0] * 200)
    values = smoothed([1.0] * 100 + [math.nan] + [1.0] * 100)
    assert math.isnan(values[100]) and values[200] == pytest.approx(1.0)
    assert smoothed([1.0, 3.0]) == [1.0, 3.0]


def test_thinning_keeps_spikes():
    steps, values = list(range(100_000)), [0.0] * 100_000
    values[54_321] = 9.0
    thin_steps, thin_values = _thin(steps, values)
    assert len(thin_steps) <= MAX_POINTS
    assert thin_values[thin_steps.index(54_321)] == 9.0
    assert thin_steps == sorted(thin_steps)
