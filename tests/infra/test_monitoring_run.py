"""A real run on a cluster shows its numbers, and goes on counting when its workers are killed and start again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kills import train_workers
from tests.nodes import Nodes
from tests.small_run import ROOT, write_small_run

SETTINGS = (
    "train.steps=4000",
    "checkpoint.every_steps=100",
    "checkpoint.keep=2",
    "eval.rows=0",
    "export.enabled=false",
    "log.dollars_per_worker_hour=3.6",
)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    nodes = Nodes(write_small_run(tmp_path))
    try:
        nodes.add(cpus=2)
        yield nodes
    finally:
        nodes.close()


def scraped(addresses: list[str]) -> dict[str, float]:
    """`name{cause}` -> value of our metrics of the run "watched", from all nodes' agents."""
    found: dict[str, float] = {}
    for address in addresses:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith("ray_headrace_") and 'run="watched"' in line:
                    cause = re.search(r'cause="([^"]*)"', line)
                    found[line.split("{")[0] + (f"{{{cause[1]}}}" if cause else "")] = float(line.rsplit(" ", 1)[1])
    return found


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_run_shows_its_numbers_and_counts_on_over_a_restart(nodes: Nodes):
    import ray

    run = nodes.start("watched", *SETTINGS)
    run.await_row("step", count=5, timeout_s=300)
    ray.init(nodes.cluster.address, log_to_driver=False)
    addresses = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    ray.shutdown()

    def soon(name: str, above: float) -> dict[str, float]:
        deadline = time.monotonic() + 120
        while (seen := scraped(addresses)).get(name, -1.0) <= above:
            assert time.monotonic() < deadline and run.process.poll() is None, f"{name} is not above {above}: {seen}"
            time.sleep(0.5)
        return seen

    first = soon("ray_headrace_steps_total", 20)
    assert first["ray_headrace_total_steps"] == 4000 and first["ray_headrace_workers"] == 1
    assert 0 < first["ray_headrace_loss"] < 10 and first["ray_headrace_tokens_per_s"] > 0 and 0 < first["ray_headrace_goodput"] < 1
    assert first["ray_headrace_spend_dollars_total"] > 0 and first["ray_headrace_dollars_per_mtok"] > 0
    assert not [name for name in first if name.startswith("ray_headrace_restarts")]
    (worker,) = train_workers(os.getpid())  # the nodes are processes of this one
    os.kill(worker, signal.SIGKILL)
    after = soon("ray_headrace_restarts_total{worker crash}", 0)
    assert after["ray_headrace_restarts_total{worker crash}"] == 1
    later = soon("ray_headrace_steps_total", after["ray_headrace_steps_total"] + 20)
    assert later["ray_headrace_tokens_total"] > first["ray_headrace_tokens_total"]
    run.process.terminate()  # it saves and ends; the rest of the steps is nobody's
    run.process.communicate(timeout=120)
