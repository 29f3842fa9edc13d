"""How a job that trains ends: every error that is meant for users as one line on stderr, without secrets, Ctrl-C and SIGTERM quietly."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable

from llm.redact import without_secrets

SAME_S = 1.0  # timeout(1) signals a process and then its group, and so the process twice: the second would cut short how it ends
_interrupted_at_s = -SAME_S


def exit_code_of(act: Callable[[], int], interrupted: str) -> int:
    """What `act` returns; the exit code of the error that it raises; 130 where a signal ended it, of which `interrupted` tells the user."""
    take_over_signals()
    try:
        return act()
    except (KeyboardInterrupt, SystemExit):  # while it starts, Ray answers SIGTERM with an exit of its own
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            print(without_secrets("".join(traceback.format_exception(error))), end="", file=sys.stderr)
            return 1
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return code


def take_over_signals() -> None:
    """SIGINT and SIGTERM end the job. To be called again after connecting to Ray, which puts its own handlers in their place."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(signum: int, frame: object) -> None:
    global _interrupted_at_s
    before_s, _interrupted_at_s = _interrupted_at_s, time.monotonic()
    if _interrupted_at_s - before_s > SAME_S:
        raise KeyboardInterrupt
