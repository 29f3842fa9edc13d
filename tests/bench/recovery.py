"""From the kill of a worker to the next optimizer step, through Ray: how long, and where the time goes.

    python -m tests.bench.recovery [--kills 5] [--workers 2] [--table FILE]

One run as a user starts it (the small one of the tests, on a private cluster of this machine). A random worker is killed with SIGKILL
after a step, the run recovers by itself, and after some more steps the next one is killed. Times are wall time on this machine, with what
else ran on it: the load is printed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from llm.metrics import MetricsTail, Row, file_reader, rows_of
from tests.small_run import start_run, write_small_run


def main() -> None:
    parser = argparse.ArgumentParser(description="from kill -9 of a worker to the next optimizer step")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        found = measure(Path(folder), options.kills, options.workers)
    names = list(dict.fromkeys(name for kill in found for name in kill))
    width = max(map(len, names))
    for name in names:
        values = [kill.get(name, 0.0) for kill in found]
        print(f"{name:<{width}}  {statistics.median(values):5.1f} s  " + " ".join(f"{value:5.1f}" for value in values))


def measure(folder: Path, kills: int, workers: int, seed: int = 0) -> list[dict[str, float]]:
    """Of each kill: the whole time until the next step had ended, and its parts, in seconds."""
    recipe = write_small_run(folder)
    settings = ("train.steps=100000", "eval.rows=0", "export.enabled=false", "checkpoint.every_steps=5", f"parallel.workers={workers}")
    process = start_run(recipe, *settings, "recovery.max_crashes=1000")
    tail = MetricsTail(file_reader(folder / "runs" / "small" / "metrics.jsonl"))
    found, chance = [], random.Random(seed)
    try:
        rows = await_steps(process, tail, 8)
        for _ in range(kills):
            victim = chance.choice(train_workers(process.pid))
            last = rows_of(rows, "step")[-1]["step"]
            os.kill(victim, signal.SIGKILL)
            killed_at_s = time.time()
            rows = await_restart(process, tail)
            restart = rows_of(rows, "event", "restart")[0]
            after = rows[rows.index(restart) :]
            first = rows_of(after, "step")[0]
            parts = dict(restart["phases"])
            began = restart["written_at_s"]
            found.append(
                {
                    "kill to the next step": first["written_at_s"] - killed_at_s,
                    "until it is noticed": max(0.0, restart_noticed_at_s(restart) - killed_at_s),
                    **parts,
                    "first step": first["written_at_s"] - began,
                }
            )
            print(f"killed after step {last}, back at {restart['step']}: {found[-1]['kill to the next step']:.1f} s", flush=True)
            rows += await_steps(process, tail, 8)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    return found


def restart_noticed_at_s(restart: Row) -> float:
    return restart["written_at_s"] - restart["down_s"] + restart["noticed_s"]


def train_workers(pid: int) -> list[int]:
    """The processes that Ray Train runs the training in."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.Error:
            continue
    return sorted(found)


def await_steps(process, tail: MetricsTail, count: int, timeout_s: float = 200) -> list[Row]:
    rows: list[Row] = []
    deadline = time.monotonic() + timeout_s
    while len(rows_of(rows, "step")) < count:
        require(process, deadline)
        rows += tail.poll()
        time.sleep(0.05)
    return rows


def await_restart(process, tail: MetricsTail, timeout_s: float = 200) -> list[Row]:
    rows: list[Row] = []
    deadline = time.monotonic() + timeout_s
    while not (found := rows_of(rows, "event", "restart")) or not rows_of(rows[rows.index(found[0]) :], "step"):
        require(process, deadline)
        rows += tail.poll()
        time.sleep(0.05)
    return rows


def require(process, deadline: float) -> None:
    if process.poll() is not None or time.monotonic() > deadline:
        raise SystemExit(f"the run is not where it should be: {process.poll()}\n{(process.communicate(timeout=5)[1])[-3000:]}")


if __name__ == "__main__":
    main()
