"""Killing the workers of a real run, and holding what came of it against an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil

from llm.metrics import MetricsTail, Row, file_reader, read_rows, rows_of


def train_workers(pid: int) -> list[int]:
    """The processes below `pid` that Ray Train trains in."""
    return _actors(pid, "RayTrainWorker")


def controllers(pid: int) -> list[int]:
    """The processes below `pid` of Ray Train's controllers: one, while a run trains."""
    return _actors(pid, "TrainController")


def _actors(pid: int, name: str) -> list[int]:
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.Error:
            continue
    return sorted(found)


class Watched:
    """A run's process and the rows that it has written so far."""

    def __init__(self, process: subprocess.Popen[str], run: Path) -> None:
        self.process, self.run = process, run
        self._tail = MetricsTail(file_reader(run / "metrics.jsonl"))

    def await_row(self, kind: str, event: str | None = None, count: int = 1, timeout_s: float = 200) -> list[Row]:
        """All new rows, once there are `count` of a kind among them."""
        rows: list[Row] = []
        deadline = time.monotonic() + timeout_s
        while len(rows_of(rows, kind, event)) < count:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(
                    f"no {count} {event or kind} rows: {self.process.poll()}\n{self.process.communicate(timeout=5)[1][-3000:]}"
                )
            rows += self._tail.poll()
            time.sleep(0.02)
        return rows

    def kill_one(self, chance: random.Random) -> int:
        """SIGKILL to a random worker; its process id."""
        victim = chance.choice(train_workers(self.process.pid))
        os.kill(victim, signal.SIGKILL)
        return victim

    def await_save(self, timeout_s: float = 20) -> None:
        """Returns while a checkpoint is being written."""
        deadline = time.monotonic() + timeout_s
        while not any((self.run / "checkpoints").glob("*.tmp*")):
            assert time.monotonic() < deadline
            time.sleep(0.001)


def finish(process: subprocess.Popen[str], timeout_s: float = 400) -> str:
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, err[-3000:]
    return out


def ledger(run: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["ledger"]) for row in rows_of(read_rows(run / "metrics.jsonl"), "step")]


def checkpoints(run: Path) -> dict[str, dict[str, object]]:
    """By step folder: size and SHA-256 of every file in it, which hold weights, moments, RNG state, ledger, counters."""
    found = {}
    for path in sorted((run / "checkpoints").glob("step-*/MANIFEST.json")):
        files = json.loads(path.read_text())["files"]
        found[path.parent.name] = files
    return found
