"""The terminal of a run: one live line where stdout is a terminal, a few plain lines where it is a file or a pipe.

It is fed rows of metrics.jsonl, by the driver, and the driver's own start-up phases. Colours follow rich's rules: none
when NO_COLOR is set or stdout is no terminal.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llm.metrics import Row, bits_per_token
from llm.observe.summary import Summary, duration, phase_line, printable, summary_lines

RECENT_STEPS = 20  # tokens/s, data wait and the rest of the time are taken over so many steps: a single one jumps about


class ProgressLine:
    """Shows a run's start-up phases, steps, evaluations and checkpoints; `close()` leaves the terminal as it was.

    Without a terminal, a step prints a line when it is a multiple of `every_steps` and `min_interval_s` have passed
    since the last step line, so the log of a long run stays short. The first and the last step, evaluations, restarts
    and the end are always printed.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        every_steps: int = 1,
        console: Console | None = None,
        min_interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._every = every_steps
        self._console = console or Console(highlight=False)
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._recent: deque[Row] = deque(maxlen=RECENT_STEPS)
        self._last: Row | None = None
        self._eval: Row | None = None
        self._last_printed_step: int | None = None
        self._printed_at_s = float("-inf")
        self._phase: tuple[str, float] | None = None
        self._live: Live | None = None
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the start-up, as in `with progress.phase("starting Ray"):` -> "starting Ray ... 6.1 s"."""
        began_at_s = self._clock()
        self._phase = (name, began_at_s)
        self._refresh()
        try:
            yield
        except BaseException:
            self._phase = None
            self._print(f"{name} ... failed after {duration(self._clock() - began_at_s)}")
            raise
        self._phase = None
        self._print(f"{name} ... {duration(self._clock() - began_at_s)}")

    def waiting(self, name: str | None) -> None:
        """Show what is waited for (with its seconds, on a terminal) until the next row or call; None: nothing."""
        self._phase = None if name is None else (name, self._clock())
        self._refresh()

    def update(self, rows: Iterable[Row]) -> None:
        """Show new rows, oldest first. Call it about each second, also without rows: a held-back line comes then."""
        for row in rows:
            {"step": self._step, "eval": self._evaluation, "event": self._event}[row["kind"]](row)
        self._print_step_if_due()
        self._refresh()

    def note(self, text: str) -> None:
        """A line of its own, above the live line."""
        self._print(text)

    def close(self) -> None:
        """End the live line and print the last step, if that has not been done. May be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._is_live = False
        if self._last is not None and self._last["step"] != self._last_printed_step:
            self._print_step(self._last)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def line(self) -> str:
        """The progress line's text: step, loss, tokens/s, data wait, MFU where known, evaluation, time left."""
        row = self._last
        if row is None:
            return ""
        parts = [f"step {row['step']:,}/{self._total:,}", f"loss {_number(row.get('loss'), '.4f')}"]
        parts.append(f"{_number(self._mean('tokens_per_s'), ',.0f')} tokens/s")
        parts.append(f"data wait {_number(self._mean('data_wait_frac'), '.1%')}")
        if (mfu := self._mean("mfu")) is not None:
            parts.append(f"MFU {mfu:.1%}")
        if self._eval is not None:
            parts.append(f"eval {_number(self._eval.get('eval_loss'), '.4f')}")
        if (left_s := self.seconds_left()) is not None and row["step"] < self._total:
            parts.append(f"ETA {duration(left_s)}")
        return "  ".join(parts)

    def seconds_left(self) -> float | None:
        """Steps left x wall time a step over the recent steps; evaluations and checkpoints among them count."""
        if not self._recent:
            return None
        first, last = self._recent[0], self._recent[-1]
        steps = last["step"] - first["step"]
        per_step_s = [self._mean("step_s") or 0.0]
        if steps > 0 and _known(last, "elapsed_s") and _known(first, "elapsed_s"):
            per_step_s.append((last["elapsed_s"] - first["elapsed_s"]) / steps)
        return max(0, self._total - last["step"]) * max(per_step_s) if max(per_step_s) > 0 else None

    def _step(self, row: Row) -> None:
        previous = self._last
        if previous is not None and (row["step"] <= previous["step"] or _earlier(row, previous)):
            self._recent.clear()  # a restart: the clock and the steps begin anew
        self._phase = None
        self._recent.append(row)
        self._last = row
        if previous is None or row["step"] == self._total:
            self._print_step(row)
        else:
            self._print_step_if_due()

    def _evaluation(self, row: Row) -> None:
        self._eval = row
        loss = row.get("eval_loss")
        bits = "" if loss is None else f" ({bits_per_token(loss):.3f} bits)"
        self._print(f"eval at step {row['step']:,}: loss {_number(loss, '.4f')} nats{bits} per token")

    def _event(self, row: Row) -> None:
        event = row.get("event")
        if event == "phase":
            self._print(" ... ".join(phase_line(row)))
            if self._phase is not None:
                self.waiting("preparing the first step")
        elif event == "checkpoint" and not self._is_live and self._due_in_s() <= 0:
            self._print(f"checkpoint at step {row.get('step')}")
        elif event == "guard":
            self._print(f"step {row.get('step')} {row.get('action')}: {row.get('cause')}")
        elif event == "restart":
            reason = f": {row['reason']}" if row.get("reason") else ""
            self._print(f"restarted from step {row.get('step')}{reason}")
        elif event == "slow_rank":
            self._print(f"rank {row.get('rank')} is slow: its forward passes take {row.get('times')} times as long as the others'")
        elif event == "export":
            self._print(f"model exported to {row.get('path')}")

    def _due_in_s(self) -> float:
        return self._printed_at_s + self._min_interval_s - self._clock()

    def _print_step_if_due(self) -> None:
        row = self._last
        if row is None or self._is_live or row["step"] == self._last_printed_step or row["step"] % self._every:
            return
        if self._due_in_s() <= 0:
            self._print_step(row)

    def _print_step(self, row: Row) -> None:
        if self._is_live:
            return  # the live line shows it, and close() prints the last one
        self._last_printed_step = row["step"]
        self._printed_at_s = self._clock()
        self._print(self.line())

    def _print(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)

    def _refresh(self) -> None:
        if not self._is_live:
            return
        if self._live is None:
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def __rich__(self) -> Text:
        if self._phase is not None:
            name, began_at_s = self._phase
            return Text(f"{name} ... {duration(self._clock() - began_at_s)}", style="dim")
        return Text(self.line(), style="bold", overflow="ellipsis", no_wrap=True)

    def _mean(self, name: str) -> float | None:
        known = [row[name] for row in self._recent if _known(row, name)]
        return sum(known) / len(known) if known else None


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """The closing table: losses before and after, tokens, time, rates, where the outputs are, generated text."""
    console = console or Console(highlight=False)
    lines = summary_lines(summary)
    if console.is_terminal:
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in lines:
            table.add_row(label, Text(printable(value)))
        console.print(table)
    else:
        width = max(len(label) for label, _ in lines)
        for label, value in lines:
            console.print(Text(f"{label:<{width}}  {printable(value)}"), soft_wrap=True)
    if summary.sample is not None:
        console.print(Text("sample"), style="cyan" if console.is_terminal else "", soft_wrap=True)
        for text in printable((summary.prompt or "") + summary.sample).splitlines():
            console.print(Text(f"  {text}"), soft_wrap=not console.is_terminal)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _known(row: Row, name: str) -> bool:
    return row.get(name) is not None


def _earlier(row: Row, previous: Row) -> bool:
    return _known(row, "elapsed_s") and _known(previous, "elapsed_s") and row["elapsed_s"] < previous["elapsed_s"]
