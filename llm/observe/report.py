"""`report.html`: one file that shows a run. No request leaves it: the pictures are inside, and no script.

matplotlib is imported when a report is written, at the end of a run, and not before.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.errors import StorageError
from llm.metrics import Row, read_rows, rows_of
from llm.observe.charts import loss_chart, throughput_chart
from llm.observe.sinks import flat_params
from llm.observe.summary import Summary, duration, phase_line, printable, summarize, summary_lines, without_redone

STYLE = """
:root { color-scheme: light; }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: #fff; color: #1f2933;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #d9e0e6; }
p.status { margin: .2rem 0 1.2rem; color: #52606d; }
.failed { color: #b42318; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #eef1f4;
         overflow-wrap: anywhere; }
th { width: 14rem; font-weight: 500; color: #52606d; }
td { font-variant-numeric: tabular-nums; }
img { width: 100%; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: 1rem; background: #f6f8fa; border-radius: 6px; }
pre b { color: #1a5fb4; }
details summary { cursor: pointer; color: #1a5fb4; margin-top: .6rem; }
""".strip()

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

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
    summary = summarize(rows, outputs)
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
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # the browser itself refuses whatever is not in this file, also if text got through unescaped
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        f'<p class="status {_text(summary.status)}">{_text(lines[0][1])}</p>',
        _section("Summary", _table(lines[1:])),
    ]
    if "loss" in pictures:
        parts.append(_section("Loss", picture_tag(pictures["loss"], "loss over steps, with the evaluations")))
    if summary.sample is not None:
        text = f"<pre><b>{_text(summary.prompt or '')}</b>{_text(summary.sample)}</pre>"
        parts.append(_section("Generated text", text))
    if "throughput" in pictures:
        alt = "tokens per second and fraction of the step time spent waiting for data, over steps"
        parts.append(_section("Throughput", picture_tag(pictures["throughput"], alt)))
    if phases:
        parts.append(_section("Start-up", _table(phases)))
    if config:
        rest = f"<details><summary>all {len(config)} settings</summary>{_table(list(config.items()))}</details>"
        parts.append(_section("Configuration", _table(first) + rest))
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _phases(rows: Sequence[Row], before: Mapping[str, float]) -> list[tuple[str, str]]:
    """(name, how long) of the start-up: the driver's phases, those among the rows, the time to the first step."""
    found = [(name, duration(seconds)) for name, seconds in before.items()]
    found += [phase_line(row) for row in rows_of(rows, "event", "phase")]
    steps = rows_of(rows, "step")
    if steps and steps[0].get("elapsed_s") is not None:
        found.append(("from the command to the end of the first step", duration(steps[0]["elapsed_s"])))
    return found


def _section(heading: str, body: str) -> str:
    return f"<h2>{_text(heading)}</h2>\n{body}"


def _table(lines: Sequence[tuple[str, str]]) -> str:
    rows = "\n".join(f"<tr><th>{_text(label)}</th><td>{_text(value)}</td></tr>" for label, value in lines)
    return f"<table>\n{rows}\n</table>"


def picture_tag(png: bytes, alt: str) -> str:
    return f'<img alt="{_text(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _text(text: str) -> str:
    return html.escape(printable(text))
