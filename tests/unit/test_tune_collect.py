"""What a group of processes tells, and what its silence tells: running out of memory is an answer, all other failures are errors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import pytest

from llm.errors import ModelError, TrainingError
from llm.train.tune import collect
from llm.train.tune.collect import Found, listen, search_largest
from llm.train.tune.events import Event, Fits, Limit, OutOfMemory, ProbeTask, RankDiedError, Timed, Trying
from llm.train.tune.memory_model import MAX_PROBES, worth_trying

TASK = ProbeTask((1, 2), (1, 2), 100)


def rank(*events: Event | BaseException) -> Iterator[Event]:
    for event in events:
        if isinstance(event, BaseException):
            raise event
        yield event


def hanging(*events: Event) -> Iterator[Event]:
    yield from events
    time.sleep(60)


def test_a_size_fits_when_all_ranks_say_so():
    told = [Limit(100), Trying(1), Fits(1, 40), Trying(2)]
    found = listen([rank(*told, Fits(2, 60), Timed(1, 1, (0.5,))), rank(*told)], TASK, 5)
    assert found == Found(100, {1: 40}, {}, {(1, 1): (0.5,)})


def test_a_rank_without_memory_ends_the_probe_though_its_peer_waits():
    told = [Limit(100), Trying(1), Fits(1, 40), Trying(2)]
    found = listen([hanging(*told), rank(*told, OutOfMemory(2, "no 5 bytes"))], TASK, 30)
    assert found == Found(100, {1: 40}, {2: "rank 1: no 5 bytes"}, {})


def test_a_process_that_dies_has_had_no_memory_for_the_size_it_tried():
    """Its peer's error comes first: the connection is gone."""
    told = [Limit(100), Trying(1), Fits(1, 40), Trying(2)]

    def late() -> Iterator[Event]:
        yield from told
        time.sleep(0.3)
        raise RankDiedError("its process died (signal 9)")

    found = listen([rank(*told, RuntimeError("connection closed by peer")), late()], TASK, 30)
    assert (found.peaks, found.failed) == ({1: 40}, {2: "rank 1: its process died (signal 9)"})


def test_a_process_that_dies_before_its_first_step_fails_the_smallest_size():
    assert listen([rank(RankDiedError("gone"))], TASK, 5).failed == {1: "rank 0: gone"}
    assert listen([rank(Limit(100), OutOfMemory(0, "building"))], TASK, 5).failed == {1: "rank 0: building"}


def test_other_failures_are_errors_and_no_measurement(monkeypatch):
    monkeypatch.setattr(collect, "GRACE_S", 0.1)
    with pytest.raises(ModelError, match="cannot be split"):
        listen([hanging(), rank(ModelError("cannot be split"))], TASK, 30)
    with pytest.raises(TrainingError, match="rank 1: some bug"):
        listen([hanging(), rank(RuntimeError("some bug"))], TASK, 30)
    with pytest.raises(TrainingError, match="gave no sign"):
        listen([hanging(Limit(100))], TASK, 0.2)


def machine(memory, limit_bytes: int, dies: bool):
    """Starts probes on a machine where a size takes `memory(rows)`, and a step rows + 1 seconds."""

    @contextlib.contextmanager
    def start(task: ProbeTask) -> Iterator[Sequence[Iterator[Event]]]:
        yield [one(task)]

    def one(task: ProbeTask) -> Iterator[Event]:
        peaks: dict[int, int] = {}
        yield Limit(limit_bytes)
        for rows in task.climb:
            if not worth_trying(peaks, rows, limit_bytes):
                break
            yield Trying(rows)
            if memory(rows) > limit_bytes:
                if dies:
                    raise RankDiedError("killed")
                yield OutOfMemory(rows, "no memory")
                return
            peaks[rows] = memory(rows)
            yield Fits(rows, peaks[rows])
        for rows in task.time:
            if rows in peaks or rows not in task.climb:
                yield from (Timed(rows, count, (count * rows + 1.0,)) for count in (1, 2))

    return start


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("limit", [200, 700, 1000, 1010, 1500, 2300, 5000])
def test_the_search_ends_with_the_largest_size_timed(limit, dies):
    def memory(rows: int) -> int:
        return 100 + 45 * rows + 3 * rows * rows // 4  # not a line

    best = max(rows for rows in range(1, 49) if 48 % rows == 0 and memory(rows) <= limit)
    measured = search_largest(48, None, machine(memory, limit, dies), lambda told: None, 5)
    search = measured.search
    assert search.largest is not None and search.limit_bytes == limit
    legal = search.legal
    assert best in (search.largest, legal[legal.index(search.largest) + 1] if search.largest < 48 else 48)
    assert len(measured.tasks) == search.probes <= MAX_PROBES
    assert measured.speed is not None and measured.usable_rows in measured.speed.microbatch_s
    assert measured.speed.update_s == pytest.approx(1.0)
    assert measured.speed.step_s(search.largest, 7) == pytest.approx(7 * search.largest + 1.0)


def test_where_nothing_fits_nothing_is_timed():
    measured = search_largest(8, None, machine(lambda rows: 500, 400, False), lambda told: None, 5)
    assert (measured.usable_rows, measured.speed, measured.search.probes) == (None, None, 1)
