"""The terminal: a live line on a terminal, few plain lines elsewhere, the first and the last step always."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llm.metrics import eval_row, event_row, step_row
from llm.observe.progress import ProgressLine, print_summary
from llm.observe.summary import duration, printable, summarize


class AClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def a_step(step: int, **changed) -> dict:
    values = {
        "loss": 4.0,
        "tokens": 512 * step,
        "tokens_per_s": 1024.0,
        "data_wait_frac": 0.03,
        "lr": 1e-3,
        "grad_norm": 1.0,
    }
    values |= {"step_s": 0.5, "mfu": None, "elapsed_s": step * 0.5, "epoch": 0, "window": 0, "offset": 0, "ledger": "0" * 32}
    return step_row(step=step, **(values | changed))


def a_run(total: int, *, terminal: bool = False, **options) -> tuple[ProgressLine, io.StringIO, AClock]:
    text, clock = io.StringIO(), AClock()
    console = Console(file=text, force_terminal=terminal, highlight=False, width=100)
    return ProgressLine(total, console=console, clock=clock, **options), text, clock


def test_a_line_says_step_loss_rate_wait_and_time_left():
    progress, text, _ = a_run(120)
    progress.update([a_step(1), a_step(2, mfu=0.41), eval_row(step=2, eval_loss=3.5, eval_tokens=10)])
    assert progress.line() == ("step 2/120  loss 4.0000  1,024 tokens/s  data wait 3.0%  MFU 41.0%  eval 3.5000  ETA 59 s")
    assert text.getvalue().splitlines()[0] == "step 1/120  loss 4.0000  1,024 tokens/s  data wait 3.0%  ETA 1:00 min"
    assert "eval at step 2: loss 3.5000 nats (5.049 bits) per token" in text.getvalue()


def test_time_left_counts_evaluations_and_survives_rows_written_together():
    progress, _, _ = a_run(100)
    progress.update([a_step(1, elapsed_s=1.0), a_step(2, elapsed_s=3.0)])  # 2 s a step, 0.5 of them training
    assert progress.seconds_left() == pytest.approx(98 * 2)
    progress, _, _ = a_run(100)
    progress.update([a_step(1, elapsed_s=3.0), a_step(2, elapsed_s=3.0)])
    assert progress.seconds_left() == pytest.approx(98 * 0.5)


def test_a_long_run_leaves_a_short_log_with_the_first_and_the_last_step():
    progress, text, clock = a_run(1000)
    for step in range(1, 1001):
        clock.now_s += 0.1
        progress.update([a_step(step)])
    progress.close()
    lines = text.getvalue().splitlines()
    assert len(lines) == pytest.approx(100 / 5, abs=2)
    assert lines[0].startswith("step 1/") and lines[-1].startswith("step 1,000/")
    assert len({line.split()[1] for line in lines}) == len(lines)


def test_slow_steps_are_printed_each_every_steps():
    progress, text, clock = a_run(100, every_steps=10)
    for step in range(1, 26):
        clock.now_s += 60
        progress.update([a_step(step)])
    progress.close()
    assert [line.split()[1] for line in text.getvalue().splitlines()] == ["1/100", "10/100", "20/100", "25/100"]


def test_a_held_back_line_comes_without_new_rows():
    progress, text, clock = a_run(100)
    progress.update([a_step(1), a_step(2)])
    clock.now_s += 6
    progress.update([])
    assert text.getvalue().splitlines()[-1].startswith("step 2/")


def test_phases_events_and_restarts_are_lines():
    progress, text, clock = a_run(100)
    with progress.phase("starting Ray"):
        clock.now_s += 6.1
    with pytest.raises(KeyError), progress.phase("connecting"):
        raise KeyError
    progress.update([event_row("phase", elapsed_s=9.0, name="building the model", phase_s=2.0)])
    progress.update([event_row("phase", elapsed_s=9.0, name="engine"), a_step(7), event_row("checkpoint", elapsed_s=1, step=7)])
    progress.update([event_row("restart", elapsed_s=1, step=4, reason="a worker died"), a_step(5, elapsed_s=0.1)])
    progress.close()
    progress.close()
    assert [line.split("  ")[0] for line in text.getvalue().splitlines()] == [
        "starting Ray ... 6.1 s",
        "connecting ... failed after 0.0 s",
        "building the model ... 2.0 s",
        "engine ... at 9.0 s",
        "step 7/100",
        "restarted from step 4: a worker died",
        "step 5/100",
    ]


def test_a_terminal_gets_a_live_line_and_keeps_the_last_step(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    progress, text, clock = a_run(50, terminal=True)
    with progress, progress.phase("starting Ray"):
        clock.now_s += 1.0
    progress.close()
    progress, text, clock = a_run(50, terminal=True)
    with progress:
        for step in range(1, 51):
            progress.update([a_step(step)])
    shown = text.getvalue()
    assert "\x1b[" in shown
    after_the_live_line = shown.rsplit("\x1b[", 1)[1]
    assert "step 50/50  loss 4.0000" in after_the_live_line
    assert "ETA" not in after_the_live_line


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, highlight=False)
    print_summary(summarize([a_step(1), event_row("sample", elapsed_s=1, prompt="A", text="b")]), console)
    assert "final loss" in text.getvalue()
    assert "\x1b[3" not in text.getvalue()  # the codes of colours


@pytest.mark.parametrize("terminal", [False, True])
def test_the_summary_says_what_came_of_it(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = io.StringIO()
    rows = [
        event_row("start", elapsed_s=0, total_steps=3),
        event_row("start", elapsed_s=0, total_steps=3),
        eval_row(step=0, eval_loss=8.0, eval_tokens=64),
        a_step(1, tokens_per_s=1.0),
        a_step(2),
        a_step(3),
    ]
    rows += [eval_row(step=3, eval_loss=4.0, eval_tokens=64), event_row("export", elapsed_s=65.0, path="runs/a/model")]
    rows += [event_row("sample", elapsed_s=65.0, prompt="The ", text="[bold]cat\x1b[2J\nsat")]
    rows.append(event_row("end", elapsed_s=65.0, status="finished", step=3))
    console = Console(file=text, force_terminal=terminal, highlight=False, width=120, no_color=True)
    print_summary(summarize(rows, {"report": "runs/a/report.html"}), console)
    shown = text.getvalue()
    for part in (
        *(
            "finished",
            "3 of 3",
            "4.0000 nats (5.771 bits) per token",
            "1,536",
            "1:05 min",
            "1,024 tokens/s",
            "3.00% of step",
        ),
        *(
            "8.0000 nats (11.542 bits) per token -> 4.0000 nats",
            "runs/a/model",
            "runs/a/report.html",
            "The [bold]cat",
            "sat",
        ),
    ):
        assert part in shown, part
    assert "\x1b[2J" not in shown  # generated text steers no terminal


def test_a_run_without_steps_has_a_summary():
    text = io.StringIO()
    print_summary(summarize([event_row("end", elapsed_s=3.0, status="failed", error="no data")]), Console(file=text))
    assert "failed: no data" in text.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1:00 min"), (3601, "1:00:01 h"), (180_000, "2 d 2 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_printable_keeps_every_script_and_drops_control():
    assert printable("a\tß字🙂\n\x1b\x00") == "a\tß字🙂\n\ufffd\ufffd"
