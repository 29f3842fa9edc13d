"""The parts of a run's time: what they are, and that they are the whole."""

from __future__ import annotations

import pytest

from llm.metrics import event_row, step_row
from llm.observe.goodput import GoodputSoFar, goodput

BEGAN_AT_S = 1_000_000.0


def event(name: str, at_s: float, began_at_s: float = BEGAN_AT_S, **fields: object) -> dict:
    return {**event_row(name, elapsed_s=at_s, **fields), "written_at_s": began_at_s + at_s}


def steps(first: int, last: int, from_s: float, began_at_s: float = BEGAN_AT_S, wait_frac: float = 0.0) -> list[dict]:
    """Steps of a second each."""
    made = []
    for number, step in enumerate(range(first, last + 1), 1):
        numbers = {"tokens_per_s": 1.0, "data_wait_frac": wait_frac, "lr": 0.1, "grad_norm": 1.0, "step_s": 1.0, "mfu": None}
        row = step_row(step=step, loss=1.0, tokens=step, elapsed_s=from_s + number, epoch=0, window=0, offset=step, ledger="x", **numbers)
        made.append({**row, "written_at_s": began_at_s + from_s + number})
    return made


def test_an_undisturbed_run_is_start_up_steps_waits_and_saves():
    rows = [event("start", 10.0), *steps(1, 20, 10.0, wait_frac=0.1), event("checkpoint", 31.0, step=20, took_s=1.0)]
    rows.append(event("end", 31.0, status="finished"))
    found = goodput(rows)
    assert found.wall_s == 31.0 and found.useful_frac == pytest.approx(18 / 31)
    assert found.parts_s == pytest.approx(
        {**dict.fromkeys(found.parts_s, 0.0), "useful": 18.0, "start-up": 10.0, "data wait": 2.0, "save stall": 1.0}
    )


def test_a_restart_costs_its_down_time_and_the_steps_done_again():
    # Steps 1 to 25 until 35 s; the checkpoint of step 20 is gone back to, 15 s after the last row.
    rows = [event("start", 10.0), *steps(1, 20, 10.0)]
    rows += [event("restart", 49.0, step=20, redone_s=5.0, down_s=14.0), event("start", 50.0), *steps(21, 40, 50.0)]
    found = goodput(rows)
    assert found.wall_s == 70.0
    assert {name: s for name, s in found.parts_s.items() if s} == pytest.approx(
        {"useful": 40.0, "start-up": 10.0, "redone steps": 5.0, "down time": 15.0}
    )


def test_a_new_command_has_a_start_up_of_its_own_and_the_time_between_is_nobodys():
    later = BEGAN_AT_S + 5000.0
    rows = [event("start", 10.0), *steps(1, 20, 10.0), event("checkpoint", 30.0, step=20, took_s=0.0)]
    rows.append(event("lost", 36.0))  # six steps more, done again below
    rows += [event("restart", 12.0, later, step=20, redone_s=6.0), event("start", 12.0, later), *steps(21, 30, 12.0, later)]
    found = goodput(rows)
    assert found.wall_s == 36.0 + 22.0
    assert found.parts_s["redone steps"] == 6.0 and found.parts_s["start-up"] == 22.0 and found.parts_s["down time"] == 0.0
    assert found.parts_s["other"] == pytest.approx(0.0)


def test_no_rows_are_no_time():
    assert goodput([]).wall_s == 0.0 and goodput([]).useful_frac == 0.0


def test_steps_that_were_seen_before_a_restart_did_them_again_are_no_use_twice():
    # The driver saw steps 21 to 25; in the file they are gone. Both tell the same.
    before = [event("start", 10.0, workers=2), *steps(1, 20, 10.0)]
    after = [event("restart", 49.0, step=20, redone_s=5.0, down_s=14.0), event("start", 50.0, workers=2), *steps(21, 40, 50.0)]
    seen = [*before, *steps(21, 25, 30.0, wait_frac=0.5), *after]
    assert goodput(seen) == goodput([*before, *after]) and goodput(seen).parts_s["useful"] == 40.0


def test_workers_cost_as_long_as_they_are_there_and_start_up_costs_as_many_as_come_up():
    rows = [event("start", 10.0, workers=4), *steps(1, 20, 10.0)]
    rows += [event("restart", 49.0, step=20, down_s=19.0), event("start", 50.0, workers=2), *steps(21, 40, 50.0)]
    assert goodput(rows).worker_s == 4 * 30 + 4 * 19 + 2 * 1 + 2 * 20  # 4 until the "start" tells of 2


def test_time_goes_on_where_no_row_comes():
    so_far = GoodputSoFar()
    for row in [event("start", 10.0, workers=3), *steps(1, 20, 10.0)]:
        so_far.add(row)
    hung = so_far.total(90.0)
    assert (hung.wall_s, hung.parts_s["other"], hung.worker_s) == (90.0, 60.0, 270.0)
    assert so_far.total(5.0) == so_far.total()  # a clock that is behind the rows takes nothing back
