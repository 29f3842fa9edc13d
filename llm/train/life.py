"""What a worker process knows of its own life: why its group was started again, and whether it has been asked to stop.

One life a process: Ray starts new processes for each worker group. `begin` runs in the process's main thread, where signal handlers can be
set; training runs in another.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from enum import IntEnum


class Wish(IntEnum):
    """Why a rank asks for a planned stop; all ranks agree on the greatest (see llm/data/batches.py)."""

    NONE = 0
    GROWTH = 1
    PREEMPTION = 2
    SIGTERM = 3

    def told(self) -> str:
        return {
            Wish.GROWTH: "nodes came back: training goes on with more workers",
            Wish.PREEMPTION: "Ray announced that a node is taken away",
            Wish.SIGTERM: "a worker was told to stop (SIGTERM)",
        }.get(self, "no reason")


@dataclass(frozen=True)
class Incident:
    """Why and when the group before this one ended, as the controller saw it."""

    cause: str
    told: str
    at_s: float  # Unix time
    number: int  # of the restart, from 1, in this command


_incident: Incident | None = None
_wish = Wish.NONE


def begin(address: str, port: int, incident: Incident | None) -> None:
    """Where rank 0 is, and what happened before."""
    global _incident
    _incident = incident
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, frame: object) -> None:
    """The first asks for a planned stop, the second ends the process."""
    if _wish is Wish.SIGTERM:
        os._exit(128 + number)
    ask_to_stop(Wish.SIGTERM)


def incident() -> Incident | None:
    return _incident


def ask_to_stop(wish: Wish) -> None:
    """The group saves and stops after one of the next steps; the run goes on in another group."""
    global _wish
    _wish = max(_wish, wish)


def wish() -> Wish:
    """What this process was asked, also by Ray's notice that a node will be taken away."""
    if _wish is Wish.NONE and _preempted():
        ask_to_stop(Wish.PREEMPTION)
    return _wish


def _preempted() -> bool:
    from ray.train.v2._internal.execution.context import get_train_context

    try:
        # Not ray.train.get_preemption_info: that is a barrier over all ranks.
        return get_train_context().preemption_context.preemption_info is not None
    except RuntimeError:
        return False  # no Ray Train here
