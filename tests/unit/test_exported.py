"""A run's numbers for monitoring: what they are after its rows, after none, after a restart, and that no secret is among them."""

from __future__ import annotations

import pytest

from llm.metrics import eval_row, event_row, step_row
from llm.observe.exported import EXPORTED, LiveRun, Reading
from llm.observe.summary import summarize, summary_lines

BEGAN_AT_S = 1_000_000.0
PRICE = 36.0  # dollars for a worker's hour: a cent a second


def event(name: str, at_s: float, **fields: object) -> dict:
    return {**event_row(name, elapsed_s=at_s, **fields), "written_at_s": BEGAN_AT_S + at_s}


def a_step(step: int, at_s: float, loss: float = 2.0, tokens: int | None = None, step_s: float = 1.0, wait: float = 0.0) -> dict:
    numbers = {"tokens_per_s": 1000 / step_s, "data_wait_frac": wait, "lr": 0.1, "grad_norm": 1.0, "mfu": None}
    where = {"epoch": 0, "window": 0, "offset": step, "ledger": "x"}
    row = step_row(step=step, loss=loss, tokens=tokens or 1000 * step, step_s=step_s, elapsed_s=at_s, **numbers, **where)
    return {**row, "written_at_s": BEGAN_AT_S + at_s}


def live(earlier: tuple[dict, ...] = (), price: float | None = PRICE, now_s: float = 0.0) -> LiveRun:
    return LiveRun(earlier, BEGAN_AT_S, BEGAN_AT_S + now_s, workers=2, dollars_per_worker_hour=price)


def read(run: LiveRun, at_s: float, *rows: dict) -> Reading:
    reading = run.read(rows, BEGAN_AT_S + at_s)
    assert set(reading.gauges) | {name for name, _ in reading.counts} <= set(EXPORTED)
    return reading


def test_steps_are_shown_as_they_were_over_the_time_they_took():
    found = read(live(), 24.0, event("start", 20.0, total_steps=9, workers=2), a_step(1, 21.0), a_step(2, 24.0, 1.5, step_s=3.0, wait=0.4))
    gauges = {name.removeprefix("headrace_"): value for name, value in found.gauges.items()}
    assert gauges["step"] == 2 and gauges["total_steps"] == 9 and gauges["loss"] == 1.5 and gauges["workers"] == 2
    assert gauges["tokens_per_s"] == pytest.approx(2000 / 4) and gauges["data_wait_frac"] == pytest.approx(0.3)
    assert gauges["goodput"] == pytest.approx((1 + 3 * 0.6) / 24)
    assert gauges["dollars_per_mtok"] == pytest.approx(24 * 2 * 0.01 / 0.002)
    assert "mfu" not in gauges and "eval_loss" not in gauges  # not known: not shown
    assert found.counts == {("headrace_steps", ""): 2, ("headrace_tokens", ""): 2000, ("headrace_spend_dollars", ""): pytest.approx(0.48)}


def test_a_run_that_stands_still_goes_on_to_cost_and_its_goodput_falls():
    run = live()
    first = read(run, 11.0, event("start", 10.0, workers=2), a_step(1, 11.0))
    later = read(run, 111.0)
    assert later.counts == {("headrace_spend_dollars", ""): pytest.approx(100 * 2 * 0.01)}
    assert later.gauges["headrace_goodput"] == pytest.approx(1 / 111)
    assert later.gauges["headrace_last_progress_at_s"] == first.gauges["headrace_last_progress_at_s"] == BEGAN_AT_S + 11


def test_steps_done_again_are_counted_but_are_no_progress_and_bring_no_new_tokens():
    run = live()
    read(run, 14.0, event("start", 10.0, workers=2), a_step(1, 11.0), a_step(2, 12.0), a_step(3, 13.0))
    restart = event("restart", 30.0, step=1, cause="node lost", redone_s=2.0, down_s=17.0, steps_redone=2)
    again = read(run, 33.0, restart, event("start", 30.0, workers=2), a_step(2, 31.0), a_step(3, 32.0))
    assert again.counts["headrace_restarts", "node lost"] == 1 and again.counts["headrace_steps", ""] == 2
    assert again.gauges["headrace_last_progress_at_s"] == BEGAN_AT_S + 14
    assert again.gauges["headrace_dollars_per_mtok"] == pytest.approx(33 * 2 * 0.01 / 0.003)
    assert again.gauges["headrace_goodput"] == pytest.approx(3 / 33)


def test_an_earlier_commands_rows_count_for_the_run_but_not_for_this_command():
    earlier = tuple({**row, "written_at_s": row["written_at_s"] - 5000} for row in (event("start", 10.0, workers=1), a_step(1, 11.0)))
    run = live(earlier)
    assert read(run, 0.0).counts == {}
    found = read(run, 9.0, event("start", 8.0, workers=2), a_step(2, 9.0))
    assert found.counts["headrace_spend_dollars", ""] == pytest.approx(9 * 2 * 0.01)
    assert found.gauges["headrace_dollars_per_mtok"] == pytest.approx((11 + 9 * 2) * 0.01 / 0.002)
    assert found.gauges["headrace_goodput"] == pytest.approx(2 / 20)


def test_a_loss_that_is_not_finite_leaves_the_last_one_and_a_run_without_a_price_tells_no_dollars():
    run = live(price=None)
    read(run, 2.0, event("start", 1.0, workers=2), a_step(1, 2.0, loss=3.0), eval_row(step=1, eval_loss=2.5, eval_tokens=9))
    found = read(run, 3.0, a_step(2, 3.0, loss=float("nan")))
    assert found.gauges["headrace_loss"] == 3.0 and found.gauges["headrace_eval_loss"] == 2.5
    assert not [name for name in [*found.gauges, *(name for name, _ in found.counts)] if "dollars" in name]


def test_the_closing_summary_tells_what_the_run_cost():
    rows = [event("start", 10.0, workers=2), a_step(1, 11.0), a_step(2, 12.0, tokens=2_000_000)]
    summary = summarize(rows, dollars_per_worker_hour=PRICE)
    assert summary.dollars == pytest.approx(0.24) and summary.dollars_per_mtok == pytest.approx(0.12)
    assert ("cost", "$0.24, $0.12 for a million tokens") in summary_lines(summary)
    assert "cost" not in dict(summary_lines(summarize(rows)))
