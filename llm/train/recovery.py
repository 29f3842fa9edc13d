"""Ray Train's decisions, made by us, in its controller: is a failed worker group started again, with how many workers, after what wait.

Ray's own policy counts failures of all kinds in one number and knows no progress. The policies here are pickled into the controller;
`incident()` is how the group that is about to start learns why the one before it ended.
"""

from __future__ import annotations

import logging
import time

from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, NoopDecision
from ray.train.v2._internal.execution.scaling_policy.scaling_policy import ScalingDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from llm.checkpoint.store import CheckpointStore
from llm.errors import HeadraceError, RecoveryError
from llm.job import Job
from llm.metrics_file import parse_line
from llm.storage import exists, join, read_bytes
from llm.train.causes import Budget, Cause, Failure, failure_of
from llm.train.life import Incident

logger = logging.getLogger(__name__)

TAIL_BYTES = 256 << 10  # of metrics.jsonl: enough for its last step
STARTUP_ERRORS = ("WorkerGroupStartupFailedError", "WorkerGroupStartupTimeoutError")

# Of this controller process: its policies are unpickled apart from each other, so they cannot share an object.
_incident: Incident | None = None
_not_before_s = 0.0


def incident() -> Incident | None:
    """Why the last group ended; None for the first."""
    return _incident


class Restarts(FailurePolicy):
    """Restarts by cause, within the budgets of `recovery:`. Where it gives up, the error says why, in words for the user."""

    def __init__(self, job: Job) -> None:
        super().__init__(FailureConfig(max_failures=-1))
        self._job = job
        self._budget = Budget(job.config.recovery)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        global _incident, _not_before_s
        failure = _failure(training_failed_error)
        now_s = time.time()
        verdict = self._budget.judge(failure, _furthest_step(self._job), now_s)
        logger.info("recovery: %s -> %s", failure, verdict)
        if verdict.gave_up is not None:
            if failure.cause is not Cause.REFUSED:
                _replace(training_failed_error, RecoveryError(f"training ended by {verdict.gave_up}"))
            return FailureDecision.RAISE
        if failure.cause is not Cause.NO_ROOM or _incident is None:  # no room: the group still waits to go on after what ended the last
            _incident = Incident(failure.cause.value, str(failure), now_s, (_incident.number if _incident else 0) + 1)
        _not_before_s = time.monotonic() + verdict.wait_s
        return FailureDecision.RETRY


class AfterAWait(FixedScalingPolicy):
    """As many workers as the run has, once the wait of `Restarts` is over."""

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if (left_s := _not_before_s - time.monotonic()) > 0:
            time.sleep(min(0.5, left_s))  # the controller would ask again at once
            return NoopDecision()
        return super().make_decision_for_non_running_worker_group()


def _failure(error: TrainingFailedError) -> Failure:
    if isinstance(error, PreemptionError):
        return Failure(Cause.PREEMPTED, tuple(error.preemption_info.preempted_ranks), "Ray took their nodes away")
    if isinstance(error, WorkerGroupError):
        return failure_of(error.worker_failures)
    inner = error.controller_failure if isinstance(error, ControllerError) else error
    if type(inner).__name__ in STARTUP_ERRORS:
        cause = Cause.NO_ROOM if "Timeout" in type(inner).__name__ else Cause.CRASH
        return Failure(cause, (), str(inner).splitlines()[0][:300])
    found = failure_of({0: inner})
    return Failure(found.cause, (), found.told)


def _replace(error: TrainingFailedError, told: HeadraceError) -> None:
    """Ray raises its own error in the driver, which looks for ours inside."""
    if isinstance(error, WorkerGroupError):
        error.worker_failures = {-1: told}  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(error, ControllerError):
        error.controller_failure = told


def _furthest_step(job: Job) -> int:
    """The last step that the run's files tell of; 0 where they cannot be read just now."""
    try:
        uri, s3 = join(job.run_uri, "metrics.jsonl"), job.config.s3
        saved = CheckpointStore(job.run_uri, s3).steps()[:1]
        lines = read_bytes(uri, s3)[-TAIL_BYTES:].splitlines() if exists(uri, s3) else []
    except HeadraceError:
        return 0
    rows = (parse_line(line) for line in lines)
    return max([*saved, *(row["step"] for row in rows if row is not None and row["kind"] == "step")], default=0)
