"""Whether the cluster's head can still be reached.

Ray's own client ends its process in the middle, without a word to the program, after 60 s in which it reached no head. Until then calls
wait. So the driver looks for itself, a bit less patiently.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress

from cluster.errors import HeadLostError

PATIENCE_S = 45.0  # a head that is started again within it (Ray can keep its state in Redis) is the same head; Ray gives up at 60
LOOK_EVERY_S = 5.0
CONNECT_S = 2.0


class HeadWatch:
    """Looks when asked, at most every `LOOK_EVERY_S`. `address`: host:port of Ray's control service (GCS)."""

    def __init__(self, address: str, patience_s: float = PATIENCE_S, every_s: float = LOOK_EVERY_S) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port, self._patience_s, self._every_s = host.strip("[]"), int(port), patience_s, every_s
        self._seen_s = self._looked_s = time.monotonic()

    def look(self) -> None:
        """Raises HeadLostError where nothing has answered at the head's address for `patience_s`."""
        if time.monotonic() - self._looked_s < self._every_s:
            return
        answers = self._answers()
        self._looked_s = time.monotonic()
        if answers:
            self._seen_s = self._looked_s
        elif (silent_s := self._looked_s - self._seen_s) >= self._patience_s:
            raise HeadLostError(
                f"the head of the Ray cluster ({self._host}:{self._port}) has not answered for {silent_s:.0f} s: it is gone, and the run "
                "ends with it. Run the same command on a cluster that lives (RAY_ADDRESS): it goes on from the last checkpoint."
            )

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection((self._host, self._port), timeout=CONNECT_S):
            return True
        return False
