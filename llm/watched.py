"""A long call that somebody looks after meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

POLL_S = 0.5


def watched(act: Callable[[], object], watch: Callable[[], None], name: str) -> None:
    """Runs `act` to its end, and calls `watch` every POLL_S meanwhile, and once after. Raises what either raises.

    `act` runs in a thread called `name`: in the main thread, Ray's libraries would take over Ctrl-C, which here ends the command within
    seconds. Where `watch` raises, the thread is left to end with the process.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        watch()
    if raised:
        raise raised[0]
