"""Ray Train's decisions, made by us, in its controller: is a failed worker group started again, with how many workers, after what wait.

Ray's own policy counts failures of all kinds in one number and knows no progress. The policies here are pickled into the controller;
`incident()` is how the group that is about to start learns why the one before it ended.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import ray
from ray._private.state import state as ray_state
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from llm.checkpoint.store import CheckpointStore
from llm.errors import HeadraceError, RecoveryError
from llm.job import Job
from llm.metrics import Row, rows_of
from llm.metrics_file import parse_line
from llm.storage import exists, join, read_bytes
from llm.train import life
from llm.train.causes import Budget, Cause, Failure, failure_of
from llm.train.elastic import legal_workers, place_workers
from llm.train.gangs import GroupScalingPolicy, group_bundle
from llm.train.life import Incident

logger = logging.getLogger(__name__)

TAIL_BYTES = 256 << 10  # of metrics.jsonl: enough for its last step
WAIT_FOR_NODES_S = 1.0  # between two looks for room, while there is none for the fewest workers
LOOK_FOR_NODES_S = 5.0  # while there are fewer workers than the run wants
NODE_ID_LABEL = "ray.io/node-id"  # which Ray puts on every node
STARTUP_ERRORS = ("WorkerGroupStartupFailedError", "WorkerGroupStartupTimeoutError")

# Of this controller process: its policies are unpickled apart from each other, so they cannot share an object.
_incident: Incident | None = None
_not_before_s = 0.0
_nodes: set[str] = set()  # alive when the last group began
_budget: Budget | None = None


def incident() -> Incident | None:
    """Why the last group ended; None for the command's first. Asked when the next is there: peers see their connections close, and Ray a
    node's workers gone, many seconds before it knows that the node is, and by now it does."""
    global _incident, _nodes
    before, _nodes = _nodes, _living_nodes()
    if _incident is not None and before - _nodes and (seemed := Cause(_incident.cause)) in (Cause.LOST_PEER, Cause.CRASH):
        _incident = replace(_incident, cause=Cause.NODE_LOST.value, told=str(Failure(Cause.NODE_LOST, (), "a node went away")))
        if _budget is not None:
            _budget.recast(seemed, Cause.NODE_LOST)
    return _incident


class Beginning(ControllerCallback):
    """Tells a controller that follows a dead one why it is there."""

    def __init__(self, incident: Incident | None) -> None:
        self._incident = incident

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        global _incident
        _incident = self._incident


class Restarts(FailurePolicy):
    """Restarts by cause, within the budgets of `recovery:`. Where it gives up, the error says why, in words for the user."""

    def __init__(self, job: Job) -> None:
        super().__init__(FailureConfig(max_failures=-1))
        self._job = job
        self._budget = Budget(job.config.recovery)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        global _incident, _not_before_s, _budget
        failure, now_s = _failure(training_failed_error), time.time()
        _budget = self._budget
        verdict = self._budget.judge(failure, furthest_step(self._job), now_s)
        logger.info("recovery: %s -> %s", failure, verdict)
        if verdict.gave_up is not None:
            if failure.cause is not Cause.REFUSED:
                _replace(training_failed_error, RecoveryError(f"training ended by {verdict.gave_up}"))
            return FailureDecision.RAISE
        if failure.cause is not Cause.NO_ROOM or _incident is None:  # no room: the group still waits to go on after what ended the last
            _incident = Incident(failure.cause.value, str(failure), now_s, (_incident.number if _incident else 0) + 1)
        _not_before_s = time.monotonic() + verdict.wait_s
        return FailureDecision.RETRY


class FixedGroupsPolicy(GroupScalingPolicy):
    """As many workers as the run has, once the wait of `Restarts` is over."""

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if _pause():
            return NoopDecision()
        return super().make_decision_for_non_running_worker_group()


class ElasticGroupsPolicy(GroupScalingPolicy):
    """As many workers as fit on the nodes that are there, at the run's legal sizes, each bound to its node. When nodes come back, the
    running group is asked to save and stop, and starts again with more.

    What fits is reckoned from the nodes' whole size: the cluster is taken to be this run's.
    """

    def __init__(self, job: Job, scaling_config: ScalingConfig) -> None:
        super().__init__(job, scaling_config)
        self._config = job.config
        self._legal = legal_workers(job.config)
        self._train_run_context: TrainRunContext | None = None
        self._looked_at_s = time.monotonic()
        self._more = 0  # looks in a row that found room for more
        self._asked: PlacementGroup | None = None  # for the fewest workers, while there is no room for them

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        self._train_run_context = train_run_context
        super().after_controller_start(train_run_context)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        if _pause():
            return NoopDecision()
        nodes = self._placement()
        if not nodes:
            self._ask()
            time.sleep(WAIT_FOR_NODES_S)
            return NoopDecision()
        if self._asked is not None:
            remove_placement_group(self._asked)
            self._asked = None
        logger.info("recovery: %d workers on %d nodes", len(nodes), len(set(nodes)))
        assert self._train_run_context is not None
        # The list that the controller reads when it makes the group: one label a worker.
        self._train_run_context.scaling_config.label_selector = [{NODE_ID_LABEL: node} for node in nodes]
        self._more, self._looked_at_s = 0, time.monotonic()
        return ResizeDecision(len(nodes), self.per_worker())

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        self._maybe_send_resource_request()
        now_s = time.monotonic()
        if worker_group_state.num_workers < self._legal[0] and now_s - self._looked_at_s >= LOOK_FOR_NODES_S:
            self._looked_at_s = now_s
            self._more = self._more + 1 if len(self._placement()) > worker_group_state.num_workers else 0
            if self._more == 2:  # once, and not for a node that shows itself for a moment
                worker_group_state.workers[0].actor.execute.remote(life.ask_to_stop, life.Wish.GROWTH)
        return NoopDecision()

    def _ask(self) -> None:
        """Has an autoscaler start nodes for the fewest workers. The policy's own request is for all of them, and an autoscaler that may not
        start so many nodes starts none for it."""
        if self._asked is None:
            group = group_bundle(self.per_worker(), self.tensor)
            self._asked = placement_group([group] * (self._legal[-1] // self.tensor) + [{"CPU": 1.0}] * self._config.data.windows_ahead)

    def _placement(self) -> list[str]:
        """The node of each worker that the cluster has room for, the data tasks' CPUs left free."""
        needed = self.per_worker()
        leaving = ray_state.get_draining_nodes() or {}
        alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
        room = {
            node["NodeID"]: min(int(node["Resources"].get(name, 0.0) // amount) for name, amount in needed.items() if amount)
            for node in alive
        }
        free_cpus = sum(node["Resources"].get("CPU", 0.0) for node in alive) - self._config.data.windows_ahead
        at_most = int(free_cpus // needed["CPU"]) if needed.get("CPU") else self._legal[0]
        return place_workers(room, self._config.parallel.tensor, self._legal, at_most)


def _pause() -> bool:
    """Whether the wait before the next group is not over; a part of it has passed then, as the controller asks again at once."""
    left_s = _not_before_s - time.monotonic()
    if left_s > 0:
        time.sleep(min(0.5, left_s))
    return left_s > 0


def _living_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


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


def furthest_step(job: Job) -> int:
    """The last step that the run's files tell of; 0 where they cannot be read just now."""
    try:
        saved = CheckpointStore(job.run_uri, job.config.s3).steps()[:1]
    except HeadraceError:
        return 0
    return max([*saved, *(row["step"] for row in _last_rows(job) if row["kind"] == "step")], default=0)


def restarts_so_far(job: Job) -> int:
    """The number of this command's last restart, as far as the last rows tell."""
    restarts = rows_of(_last_rows(job), "event", "restart")
    return restarts[-1].get("number", 0) if restarts else 0


def _last_rows(job: Job) -> list[Row]:
    try:
        uri, s3 = join(job.run_uri, "metrics.jsonl"), job.config.s3
        lines = read_bytes(uri, s3)[-TAIL_BYTES:].splitlines() if exists(uri, s3) else []
    except HeadraceError:
        return []
    return [row for row in map(parse_line, lines) if row is not None]
