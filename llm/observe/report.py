"""`report.html`: one file that shows a run. No request leaves it: the pictures are inside, and no script.

matplotlib is imported when a report is written, at the end of a run, and not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.errors import StorageError
from llm.metrics import Row, read_rows, rows_of
from llm.observe.charts import loss_chart, throughput_chart
from llm.observe.page import escaped, page, picture, section, table
from llm.observe.sinks import flat_params
from llm.observe.summary import Summary, duration, phase_line, summarize, summary_lines, without_redone

# The keys of the config that a reader looks for first; all the others are one click away.
_FIRST_KEYS = (
    *("run.name", "run.seed", "model.preset", "model.path", "data.seq_len", "parallel.workers", "parallel.tensor"),
    *("parallel.zero_stage", "train.steps", "train.batch_rows", "train.lr", "train.schedule", "train.optimizer"),
    "train.precision",
)


def write_report(
    source: Path | str | Sequence[Row],
    out: Path | str,
    *,
    title: str | None = None,
    config: Mapping[str, Any] | None = None,
    outputs: Mapping[str, str] | None = None,
    phases: Mapping[str, float] | None = None,
) -> Path:
    """Write `out`/report.html and `out`/loss.png; returns the path of report.html.

    `source` is a run's folder, which holds metrics.jsonl, or its rows. `config` is the resolved config; secrets in it
    are blanked. `phases` are start-up phases that the rows do not tell, the driver's: name -> seconds. A run without a
    single step gets a report without pictures. Raises StorageError where `out` cannot be written.
    """
    folder = Path(source) if isinstance(source, (str, Path)) else None
    rows = list(source) if not isinstance(source, (str, Path)) else read_rows(Path(source) / "metrics.jsonl")
    summary = summarize(rows, outputs, ((config or {}).get("log") or {}).get("dollars_per_worker_hour"))
    rows = without_redone(rows)
    if title is None:
        title = flat_params(config or {}).get("run.name") or (folder.name if folder else "run")
    pictures = {}
    if rows_of(rows, "step") or rows_of(rows, "eval"):
        pictures["loss"] = loss_chart(rows, title)
    if rows_of(rows, "step"):
        pictures["throughput"] = throughput_chart(rows)
    page = _page(title, summary, pictures, _phases(rows, phases or {}), flat_params(config or {}))
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if "loss" in pictures:
            (out / "loss.png").write_bytes(pictures["loss"])
        (out / "report.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"The report cannot be written to {out}: {error.strerror}.") from error
    return out / "report.html"


def _page(
    title: str,
    summary: Summary,
    pictures: Mapping[str, bytes],
    phases: list[tuple[str, str]],
    config: Mapping[str, str],
) -> str:
    lines = summary_lines(summary)
    first = [(key, config[key]) for key in _FIRST_KEYS if key in config and config[key] != "null"]
    parts = [
        f'<p class="status {escaped(summary.status)}">{escaped(lines[0][1])}</p>',
        section("Summary", table(lines[1:])),
    ]
    if "loss" in pictures:
        parts.append(section("Loss", picture(pictures["loss"], "loss over steps, with the evaluations")))
    if summary.sample is not None:
        text = f"<pre><b>{escaped(summary.prompt or '')}</b>{escaped(summary.sample)}</pre>"
        parts.append(section("Generated text", text))
    if "throughput" in pictures:
        alt = "tokens per second and fraction of the step time spent waiting for data, over steps"
        parts.append(section("Throughput", picture(pictures["throughput"], alt)))
    if phases:
        parts.append(section("Start-up", table(phases)))
    if config:
        rest = f"<details><summary>all {len(config)} settings</summary>{table(list(config.items()))}</details>"
        parts.append(section("Configuration", table(first) + rest))
    return page(title, parts)


def _phases(rows: Sequence[Row], before: Mapping[str, float]) -> list[tuple[str, str]]:
    """(name, how long) of the start-up: the driver's phases, those among the rows, the time to the first step."""
    found = [(name, duration(seconds)) for name, seconds in before.items()]
    found += [phase_line(row) for row in rows_of(rows, "event", "phase")]
    steps = rows_of(rows, "step")
    if steps and steps[0].get("elapsed_s") is not None:
        found.append(("from the command to the end of the first step", duration(steps[0]["elapsed_s"])))
    return found
