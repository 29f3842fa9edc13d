"""What becomes of a failure: its cause, and whether the group is started again."""

from __future__ import annotations

from collections import deque

import pytest

from llm.config import RecoverySection
from llm.errors import CheckpointError, DataError, HangError, PlannedStop, StorageError, TrainingError
from llm.train.causes import Budget, Cause, Failure, failure_of


class ActorDiedError(Exception):
    """As Ray's: known by its name."""

    def __init__(self, text: str, preempted: bool = False) -> None:
        super().__init__(text)
        self.preempted = preempted


class WorkerHealthCheckFailedError(Exception):
    def __init__(self, inner: Exception) -> None:
        super().__init__("A worker health check failed.")
        self.health_check_failure = inner


def died(text: str, preempted: bool = False) -> Exception:
    return WorkerHealthCheckFailedError(ActorDiedError(text, preempted))


CONNECTION_LOST = RuntimeError("[/a/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:1234. This is typically caused by ...")


@pytest.mark.parametrize(
    ("errors", "cause", "ranks"),
    [
        ({0: CONNECTION_LOST, 1: died("Worker exit type: SYSTEM_ERROR ... End of file.")}, Cause.CRASH, (1,)),
        ({0: CONNECTION_LOST}, Cause.LOST_PEER, (0,)),
        ({0: CONNECTION_LOST, 3: died("The actor died because its node has died.")}, Cause.NODE_LOST, (3,)),
        ({0: died("its node has died", preempted=True), 1: CONNECTION_LOST}, Cause.PREEMPTED, (0,)),
        ({1: died("Worker exit type: NODE_OUT_OF_MEMORY"), 0: CONNECTION_LOST}, Cause.OUT_OF_MEMORY, (1,)),
        ({0: HangError("rank 1 did not arrive"), 1: died("End of file")}, Cause.HANG, (0,)),
        ({0: PlannedStop("x"), 1: CONNECTION_LOST}, Cause.PLANNED, (0,)),
        ({0: CheckpointError("rank 0 could not write: No space left on device"), 1: CONNECTION_LOST}, Cause.STORAGE_FULL, (0,)),
        ({0: StorageError("s3://b: cannot write: throttled")}, Cause.STORAGE, (0,)),
        ({0: OSError(28, "No space left on device")}, Cause.STORAGE_FULL, (0,)),
        ({0: DataError("too many bad records"), 1: CONNECTION_LOST}, Cause.REFUSED, (0,)),
        ({0: TrainingError("the loss of step 3 is nan"), 1: died("End of file")}, Cause.REFUSED, (0,)),
        ({0: KeyError("x")}, Cause.BUG, (0,)),
        ({0: CONNECTION_LOST, 1: RuntimeError("CUDA error: uncorrectable ECC error encountered")}, Cause.CRASH, (1,)),
    ],
)
def test_the_error_that_explains_most_is_the_cause(errors, cause, ranks):
    found = failure_of(errors)
    assert (found.cause, found.ranks) == (cause, ranks)


def test_a_lost_connection_is_told_without_the_line_of_torchs_source():
    assert str(failure_of({2: CONNECTION_LOST})) == "lost connection (rank 2: Connection closed by peer [127.0.0.1]:1234)"


def crash(cause: Cause = Cause.CRASH) -> Failure:
    return Failure(cause, (1,), "its process was killed")


def test_crashes_without_progress_stop_the_run_with_all_causes_listed():
    budget = Budget(RecoverySection(first_wait_s=1.0))
    assert budget.judge(crash(), 40, 0.0).wait_s == 0.0
    assert budget.judge(crash(Cause.HANG), 40, 1.0).wait_s == 1.0
    assert budget.judge(crash(), 38, 2.0).wait_s == 2.0  # redone steps are no progress
    gave_up = budget.judge(crash(Cause.OUT_OF_MEMORY), 40, 3.0).gave_up
    assert gave_up is not None and "no step after 40" in gave_up
    assert [cause in gave_up for cause in ("worker crash", "hang", "out of memory")] == [True] * 3


def test_progress_takes_the_wait_and_the_count_back():
    budget = Budget(RecoverySection())
    for step in range(10):
        assert budget.judge(crash(), step + 1, float(step)) == budget.judge(crash(Cause.PLANNED), step + 1, float(step))


def test_each_cause_has_its_budget_in_any_24_hours():
    budget = Budget(RecoverySection(max_hangs=2))
    assert budget.judge(crash(Cause.HANG), 1, 0.0).gave_up is None
    assert budget.judge(crash(Cause.HANG), 2, 10.0).gave_up is None
    assert "recovery.max_hangs=2" in (budget.judge(crash(Cause.HANG), 3, 20.0).gave_up or "")
    assert budget.judge(crash(), 3, 21.0).gave_up is None
    assert budget.judge(crash(Cause.HANG), 4, 24 * 3600 + 5.0).gave_up is None


@pytest.mark.parametrize("cause", [Cause.PLANNED, Cause.NO_ROOM])
def test_a_planned_stop_and_a_lack_of_room_use_up_nothing(cause):
    budget = Budget(RecoverySection(max_crashes=0))
    assert all(budget.judge(crash(cause), 5, float(n)).gave_up is None for n in range(50))


@pytest.mark.parametrize("cause", [Cause.REFUSED, Cause.BUG])
def test_what_would_fail_again_is_not_retried(cause):
    assert Budget(RecoverySection()).judge(crash(cause), 5, 0.0).gave_up


@pytest.mark.parametrize("cause", list(Cause))
@pytest.mark.parametrize("is_gone", [True, False])
def test_what_a_lost_node_looked_like_at_first_is_counted_as_one(monkeypatch: pytest.MonkeyPatch, cause: Cause, is_gone: bool) -> None:
    from llm.train import recovery
    from llm.train.life import Incident

    budget = Budget(RecoverySection(), restarts={cause: deque([1.0])})
    monkeypatch.setattr(recovery, "_budget", budget)
    monkeypatch.setattr(recovery, "_incident", Incident(cause.value, "as it seemed", 1.0, 1))
    monkeypatch.setattr(recovery, "_nodes", {"a", "b"})
    monkeypatch.setattr(recovery, "_living_nodes", lambda: {"a"} if is_gone else {"a", "b"})
    seen = recovery.incident()
    is_recast = is_gone and cause in (Cause.LOST_PEER, Cause.CRASH)
    assert seen is not None and seen.cause == (Cause.NODE_LOST if is_recast else cause).value
    counted = {one for one, times in budget.restarts.items() if times}
    assert counted == {Cause.NODE_LOST if is_recast else cause}
