"""One trial, inside a Tune trial's process: a real run, as a process and a Ray job of its own, whose evaluations are reported as they come.

A job of its own: whatever Ray holds for a job, actors and placement groups, goes when its driver does, at once and without anybody's help.
So to stop a trial is to end its process, and that ends with this one (PR_SET_PDEATHSIG), however that ends. A run that was cut goes on
from its last checkpoint when the same trial starts again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.config_file import parse_run
from llm.search.trials import FAILED, FINISHED, METRICS, PAUSED, Point, curve_of, took_s_of
from llm.storage import join, read_bytes_or_none

POLL_S = 0.3
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # before any fork: nothing may be loaded between fork and exec
# What Ray puts into its workers' environment, and would take for the new driver's own.
_OF_A_WORKER = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_TRIAL_ID", "RAY_CLIENT_MODE", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class TrialRun:
    """What the process of a trial needs to know. `command` takes the run's YAML file as its last argument; `ended`: what is known of it is
    only to be told again."""

    number: int
    uri: str
    yaml: str
    command: tuple[str, ...]
    folder: str  # the current directory of the sweep's command
    ended: str = ""


def run_trial(run: TrialRun, report: Callable[[dict[str, Any]], None], address: str) -> None:
    """Reports every evaluation once, the last one with how the run ended: `status`, and the `cause` of a failure."""
    reporter = _Reporter(run, report)
    if run.ended:
        reporter.evaluations(0.0)
        reporter.end(run.ended, "", 0.0)
        return
    began_s = time.monotonic() - reporter.took_s()  # what it took before it was cut counts
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:  # Tune's own folder of this trial, which goes with it
        path, log = Path(scratch) / "run.yaml", Path(scratch) / "log"
        path.write_text(run.yaml)
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*run.command, str(path)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=run.folder if Path(run.folder).is_dir() else None,
                env=_environment(address, scratch),
                preexec_fn=_end_with_parent,
            )
            try:
                while process.poll() is None:
                    time.sleep(POLL_S)
                    reporter.evaluations(time.monotonic() - began_s)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        took_s = time.monotonic() - began_s
        reporter.evaluations(took_s)
        if process.returncode == 0:
            reporter.end(PAUSED if reporter.is_paused else FINISHED, "", took_s)
        else:
            reporter.end(FAILED, cause_of(process.returncode, log.read_text(errors="replace")), took_s)


def cause_of(code: int, log: str) -> str:
    """Why a run's process ended so, in a line: its own error message, else its last words."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if errors:
        return " ".join(lines[errors[-1] :])[len("error: ") :][:500]
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"its process ended by {ended}{': ' + lines[-1][:300] if lines else ''}"


class _Reporter:
    def __init__(self, run: TrialRun, report: Callable[[dict[str, Any]], None]) -> None:
        self._config, self._report = parse_run(run.yaml, run.uri), report
        self._metrics = join(run.uri, METRICS)
        self._step, self._size = 0, -1

    @property
    def is_paused(self) -> bool:
        """Whether the run, when it ends, is to go on later."""
        return self._config.train.last_step < self._config.train.steps

    def took_s(self) -> float:
        """What the run has taken so far, by its own record."""
        return took_s_of(self._read())

    def evaluations(self, took_s: float) -> None:
        """Reports those that are new, but for the last step's: a run that is stopped there would not export its model. A step that is done
        again after a restart is reported once: it gives the same."""
        data = self._read()
        if len(data) == self._size:
            return
        self._size = len(data)
        for point in curve_of(data, self._config):
            if self._step < point.step < self._config.train.last_step:
                self._step = point.step
                self._report(_shown(point, took_s))

    def end(self, status: str, cause: str, took_s: float) -> None:
        curve = curve_of(self._read(), self._config)
        last = _shown(curve[-1], took_s) if curve and curve[-1].step > self._step else {}
        self._report({**last, "status": status, "cause": cause, "took_s": took_s})

    def _read(self) -> bytes:
        return read_bytes_or_none(self._metrics, self._config.s3) or b""


def _shown(point: Point, took_s: float) -> dict[str, Any]:
    return {"eval_loss": point.loss, "tokens": point.tokens, "step": point.step, "took_s": took_s}


def _environment(address: str, scratch: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _OF_A_WORKER}
    return {**kept, "RAY_ADDRESS": address, "TMPDIR": scratch}


def _end_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
