"""What the driver does when Ray's Train controller dies: waits until nothing of its group is left, and says why the next one begins.

The controller decides about all other failures (see recovery.py), and its counts die with it. The driver's budget is of controllers alone.
"""

from __future__ import annotations

import time

import ray
from ray._private.state import state as ray_state
from ray._raylet import PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from llm.errors import RecoveryError, TrainingError
from llm.job import Job
from llm.train.causes import Budget, Cause, Failure, failure_of
from llm.train.life import Incident
from llm.train.recovery import furthest_step, restarts_so_far

END_S = 60.0  # for what the dead controller started; Ray ends it within a second
LOOK_S = 0.1
DEATHS = (RayActorError, OutOfMemoryError)  # of a controller, as its driver sees them: Ray's memory monitor kills controllers too
GROUP_CLASSES = ("TrainController", "RayTrainWorker")


class Controllers:
    """Their losses in this command."""

    def __init__(self, job: Job) -> None:
        self._job, self._budget = job, Budget(job.config.recovery)

    def after(self, death: RayActorError | OutOfMemoryError) -> Incident:
        """Why another controller is started, when nothing of the dead one's group is left. RecoveryError where `recovery.max_crashes`,
        or `max_out_of_memory`, or `max_without_progress` is used up."""
        found, now_s = failure_of({0: death}), time.time()
        cause = found.cause if found.cause is Cause.OUT_OF_MEMORY else Cause.CONTROLLER
        failure = Failure(cause, (), f"Ray Train's controller: {found.told}")
        verdict = self._budget.judge(failure, furthest_step(self._job), now_s)
        if verdict.gave_up is not None:
            raise RecoveryError(f"training ended by {verdict.gave_up}")
        _await_end_of_group()
        time.sleep(verdict.wait_s)
        return Incident(failure.cause.value, str(failure), now_s, restarts_so_far(self._job) + 1)


def _await_end_of_group() -> None:
    """Frees the places of this driver's dead group, and returns when its actors are gone.

    Ray ends what a dead actor owned, but keeps its placement groups until the whole job ends.
    """
    job_id, deadline_s = ray.get_runtime_context().get_job_id(), time.monotonic() + END_S
    while True:
        places = _placement_groups(job_id)
        for place in places:
            remove_placement_group(PlacementGroup(place))
        actors = [actor for actor in ray_state.actor_table(None).values() if actor["JobID"] == job_id and actor["State"] != "DEAD"]
        living = [actor for actor in actors if actor["ActorClassName"] in GROUP_CLASSES]
        if not places and not living:
            return
        if time.monotonic() > deadline_s:
            told = ", ".join(f"{actor['ActorClassName']} {actor['ActorID']}" for actor in living) or f"{len(places)} placement groups"
            raise TrainingError(
                f"Ray's Train controller died, and {told} of its group did not end within {END_S:.0f} s: a second group would train beside "
                "the first. Run the same command again: it goes on from the last checkpoint."
            )
        time.sleep(LOOK_S)


def _placement_groups(job_id: str) -> list[PlacementGroupID]:
    """Those that this driver's actors have made and nobody has removed."""
    found = (PlacementGroupTableData.FromString(data) for data in ray_state._connect_and_get_accessor().get_placement_group_table())
    return [
        PlacementGroupID(group.placement_group_id)
        for group in found
        if group.creator_job_id.hex() == job_id and group.state != PlacementGroupTableData.REMOVED
    ]
