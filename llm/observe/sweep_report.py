"""`report.html` of a sweep: one file; no request leaves it, the pictures are inside, and no script."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm.config_file import dump_run
from llm.observe.page import escaped, page, picture, section
from llm.observe.summary import duration
from llm.observe.sweep_charts import curves_chart, importance_chart, parallel_chart
from llm.observe.sweep_table import ranked, settings_line
from llm.search.importance import importance
from llm.search.trials import FAILED, Trial, best_of
from llm.storage import join, write_bytes

if TYPE_CHECKING:
    from llm.search.study import Study


def write_sweep_report(study: Study) -> str:
    """Writes the report beside the trials; its URI."""
    uri = join(study.sweep.uri, "report.html")
    write_bytes(uri, _page(study).encode(), study.sweep.base.s3)
    return uri


def _page(study: Study) -> str:
    file, trials, keys = study.sweep.file, ranked(study.trials), list(study.sweep.space.domains)
    best, spent = best_of(study.trials), study.spent()
    parts = [f"<p class=status>{escaped(_status(study))}</p>", *(f"<p>{escaped(remark)}</p>" for remark in study.sweep.remarks)]
    if best is not None:
        told = f"<b>{escaped(settings_line(best.settings))}</b>"
        parts += [
            f"<p>Best: trial {best.number:04d}, loss {best.loss:.4f} nats per token: {told}</p>",
            section("Loss of all trials", picture(curves_chart(trials, best.number), "evaluation loss of every trial over tokens")),
            section("Settings and loss", picture(parallel_chart(trials, keys, best.number), "parallel coordinates of settings and loss")),
        ]
    constant = [trial for trial in trials if not trial.takeovers]  # settings that changed on the way explain no loss
    if shares := importance(constant, keys):
        told = "<p>The share of the differences in loss that each key explains by itself, at as many tokens as all trials have seen.</p>"
        parts.append(section("What matters", told + picture(importance_chart(shares), "importance of each key")))
    rows = "".join(_row(trial, study.status_of(trial), keys) for trial in trials)
    heads = "".join(f"<td><b>{escaped(name)}</b></td>" for name in ("trial", *keys, "status", "tokens", "loss", "time"))
    parts.append(section("Trials", f"<table><tr>{heads}</tr>{rows}</table>"))
    if taken := sorted((each for trial in trials for each in trial.takeovers), key=lambda each: (each.step, each.trial)):
        told = "".join(
            f"<li>at step {each.step} trial {each.trial:04d} took over from {each.of:04d}: {escaped(settings_line(each.settings))}</li>"
            for each in taken
        )
        parts.append(section("Population", f"<ul>{told}</ul>"))
    cost = f", ${spent.dollars:,.2f}" if spent.dollars else ""
    parts.append(section("Cost", f"<p>{spent.tokens:,} tokens, {duration(spent.hours * 3600)} of training{cost}</p>"))
    if best is not None:
        parts.append(section("best.yaml", f"<pre>{escaped(study.sweep.best(study.configs[best.number]))}</pre>"))
    parts.append(f"<details><summary>the run that was varied</summary><pre>{escaped(dump_run(study.sweep.base))}</pre></details>")
    return page(file.sweep.name, parts)


def _row(trial: Trial, status: str, keys: list[str]) -> str:
    told = f"{status}: {trial.cause}" if trial.cause else status
    cells = [f"{trial.number:04d}", *(str(trial.settings.get(key, "")) for key in keys), told]
    cells += [f"{trial.tokens:,}", f"{trial.loss:.4f}" if trial.curve else "-", duration(trial.took_s)]
    return f"<tr{' class=failed' if trial.status == FAILED else ''}>{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>"


def _status(study: Study) -> str:
    counts: dict[str, int] = {}
    for trial in study.trials.values():
        status = study.status_of(trial)
        counts[status] = counts.get(status, 0) + 1
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return f"{told}{f'; ended by {study.cut}' if study.cut else ''}"
