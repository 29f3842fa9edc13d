"""A sweep on the terminal: one live table where stdout is a terminal, a line whenever a trial begins, pauses, goes on or ends where it is
not."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from llm.observe.summary import duration
from llm.search.trials import FAILED, FINISHED, RUNNING, Trial, best_of

if TYPE_CHECKING:
    from llm.search.study import Study

WIDTH = 240  # of a table that goes to a file, in columns
SHOWN = 30  # trials in the live table: the best and those that run


class SweepTable:
    def __init__(self, name: str, console: Console | None = None) -> None:
        self._name, self._console = name, console or _console()
        self._live = Live(console=self._console, refresh_per_second=2) if self._console.is_terminal else None
        self._told: dict[int, str] = {}  # the status that was printed last, by trial

    def __enter__(self) -> SweepTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, study: Study) -> None:
        if self._live is not None:
            self._live.update(_table(self._name, study, SHOWN))
            return
        for trial in study.trials.values():
            status, before = study.status_of(trial), self._told.get(trial.number)
            if status == before:
                continue
            self._told[trial.number] = status
            seen = f", loss {trial.loss:.4f} after {trial.tokens:,} tokens" if trial.curve else ""
            told = f"{status}: {trial.cause}" if trial.cause else f"{'goes on' if before and status == RUNNING else status}{seen}"
            self._console.print(f"trial {trial.number:04d} {settings_line(trial.settings)}  {told}", soft_wrap=True)

    def conclude(self, study: Study, best: Trial, path: str, report: str) -> None:
        """The whole table, and what to do with it."""
        if self._live is None:
            self._console.print(_table(self._name, study, len(study.trials)))
        spent = study.spent()
        cost = f", ${spent.dollars:,.2f}" if spent.dollars else ""
        told = f"{len(study.trials)} trials, {spent.tokens:,} tokens, {duration(spent.hours * 3600)} of training{cost}"
        self._console.print(f"{told}{f'; ended by {study.cut}' if study.cut else ''}", soft_wrap=True)
        so_far = "" if best.status == FINISHED else f" after {best.tokens:,} tokens, {study.status_of(best)}: none came to its end"
        told = f"best: trial {best.number:04d}, loss {best.loss:.4f}{so_far}: {settings_line(best.settings)}"
        self._console.print(told, soft_wrap=True)
        for remark in study.sweep.remarks:
            self._console.print(f"note: {remark}", soft_wrap=True)
        self._console.print(f"config  {path}   (headrace pretrain --config {path})\nreport  {report}", soft_wrap=True)


def _console() -> Console:
    """On what stdout is now: Tune's own words go to a log. Without a terminal no width is known: one at which no row is folded."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def ranked(trials: Mapping[int, Trial]) -> list[Trial]:
    """Best first: those that came furthest, by loss; then those that failed."""
    return sorted(trials.values(), key=lambda t: (t.status == FAILED, -t.tokens, t.loss, t.number))


def settings_line(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _table(name: str, study: Study, most: int) -> Table:
    table = Table(title=f"sweep {name}", title_justify="left", box=None)
    keys = list(study.sweep.space.domains)
    for column in ("trial", *keys, "status", "tokens", "loss", "time"):
        table.add_column(column, overflow="fold")
    best = best_of(study.trials)
    for trial in ranked(study.trials)[:most]:
        loss = f"{trial.loss:.4f}" if math.isfinite(trial.loss) else "-"
        values = [str(trial.settings.get(key, "")) for key in keys]
        style = "bold" if best and trial.number == best.number else None
        status = study.status_of(trial)
        told = f"{status}: {trial.cause}" if trial.cause else status
        table.add_row(f"{trial.number:04d}", *values, told, f"{trial.tokens:,}", loss, duration(trial.took_s), style=style)
    return table
