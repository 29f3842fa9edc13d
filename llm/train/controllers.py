"""One Ray Train controller after another: where its process dies, which nobody restarts, the driver begins with a new one.

The workers of a dead controller are ended by Ray, and its placement group is kept until the driver's job is over: here both are seen to
before the next begins. A worker that still lived would write beside its successor under the same lease.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import PlacementGroupID
from ray._private.state import state as ray_state
from ray.core.generated import gcs_pb2
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from llm.errors import HeadraceError, RecoveryError
from llm.job import Job
from llm.metrics import Row, rows_of
from llm.metrics_file import parse_line
from llm.storage import exists, join, read_bytes
from llm.train.causes import Budget, Cause, Failure, failure_of
from llm.train.life import Incident
from llm.train.recovery import furthest_step

logger = logging.getLogger(__name__)

_tables: Any = gcs_pb2  # protobuf makes its classes at run time, unseen by a type checker

ORPHANS_END_WITHIN_S = 60.0  # seen: 0.3 s
_PLACEMENT_GROUP_REMOVED = _tables.PlacementGroupTableData.REMOVED


def with_new_controllers(job: Job, fit: Callable[[Incident | None], object]) -> None:
    """Calls `fit` with why the controller before ended, until one of its controllers lives to the run's end or `recovery:` allows no more.

    Raises what `fit` raises, but for the death of the controller, and RecoveryError where it died once too often.
    """
    budget, incident = Budget(job.config.recovery), None
    while True:
        try:
            fit(incident)
            return
        except RayActorError as error:
            if isinstance(error, RayTaskError):  # of another actor, which the controller has asked
                raise
            now_s, failure = time.time(), _failure(error)
            verdict = budget.judge(failure, furthest_step(job), now_s)
            logger.info("recovery: %s -> %s", failure, verdict)
            if verdict.gave_up is not None:
                raise RecoveryError(f"training ended by {verdict.gave_up}") from None
            end_orphans(error.actor_id)
            incident = Incident(failure.cause.value, str(failure), now_s, _restarts_told(job) + 1)
            time.sleep(verdict.wait_s)


def _failure(error: RayActorError) -> Failure:
    found = failure_of({0: error})
    return Failure(Cause.CONTROLLER if found.cause is Cause.CRASH else found.cause, (), f"Ray Train's controller: {found.told}")


def end_orphans(actor_id: str | None) -> None:
    """Returns when no process lives of the actors that a dead actor made, nor of theirs, and its placement groups are removed.

    Raises RecoveryError where one of the processes does not end.
    """
    accessor = ray_state._connect_and_get_accessor()
    deadline_s = time.monotonic() + ORPHANS_END_WITHIN_S
    while left := _living_below(actor_id, accessor):
        if time.monotonic() > deadline_s:
            raise RecoveryError(
                f"Ray Train's controller died, and {ORPHANS_END_WITHIN_S:.0f} s later processes that it had started still live: "
                f"{', '.join(left)}. A new one would write beside them. End them, and run the same command: it goes on from the last "
                "checkpoint."
            )
        time.sleep(0.1)
    for group in map(_tables.PlacementGroupTableData.FromString, accessor.get_placement_group_table()):
        if group.creator_actor_id.hex() == actor_id and group.state != _PLACEMENT_GROUP_REMOVED:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def _living_below(actor_id: str | None, accessor: Any) -> list[str]:
    """The processes of the actors below a dead one. Ray calls an actor dead before its process is: the raylet's word counts, and nobody's
    where the node is gone."""
    actors = [_tables.ActorTableData.FromString(row) for row in accessor.get_actor_table(None, None)]
    makers = {actor.address.worker_id for actor in actors if actor.actor_id.hex() == actor_id} - {b""}
    below: list[Any] = []
    while makers:
        made = [actor for actor in actors if actor.owner_address.worker_id in makers and not actor.is_detached]
        below += made
        makers = {actor.address.worker_id for actor in made} - {b""}
    nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    workers = map(_tables.WorkerTableData.FromString, accessor.get_worker_table())
    running = {worker.worker_address.worker_id for worker in workers if worker.is_alive}
    return [
        f"{actor.class_name}, pid {actor.pid} on {actor.address.ip_address}"
        for actor in below
        if actor.address.worker_id in running and actor.address.node_id.hex() in nodes
    ]


def _restarts_told(job: Job) -> int:
    """The number of this command's last restart that its metrics tell of; 0 where there is none, or where they cannot be read just now."""
    try:
        uri, s3 = join(job.run_uri, "metrics.jsonl"), job.config.s3
        lines = read_bytes(uri, s3).splitlines() if exists(uri, s3) else []
    except HeadraceError:
        return 0
    rows: list[Row] = [row for line in lines if (row := parse_line(line)) is not None]
    numbers = [row.get("number", 0) for row in rows_of(rows, "event", "restart") if row.get("written_at_s", 0.0) >= job.started_at_s]
    return numbers[-1] if numbers else 0
