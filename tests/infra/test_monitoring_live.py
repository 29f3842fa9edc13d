"""A run's numbers, from Ray's metrics on a cluster with token auth, in a real Prometheus that scrapes it with the configuration shipped."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.infra import monitored_ray as shown
from tests.infra.test_monitoring import MONITORING, OURS, expressions, metric_names
from tests.ports import free_port

ROOT = MONITORING.parents[1]
NEEDS_A_GPU = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available"}
READY_S = 120.0


@pytest.fixture(scope="module")
def prometheus() -> Iterator[Callable[[str], dict[str, Any]]]:
    """`GET path` of a Prometheus that scrapes a Ray with a driver that shows a run; both end with the fixture."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not on PATH: install it (Debian: apt-get install prometheus)")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets are in it
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_metrics_report_interval_ms": "2000"}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        command = [sys.executable, "-m", "tests.infra.monitored_ray", f"{folder}/ray"]
        log = (Path(folder) / "ray.log").open("wb")
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        server = None
        try:
            assert driver.stdout is not None and driver.stdin is not None
            assert driver.stdout.readline(), (Path(folder) / "ray.log").read_text(errors="replace")[-3000:]
            config = (MONITORING / "prometheus.yaml").read_text().replace("/tmp/ray/", f"{folder}/ray/").replace(": 15s", ": 1s")
            (Path(folder) / "prometheus.yaml").write_text(config)
            shutil.copy(MONITORING / "alerts.yaml", folder)
            address = f"127.0.0.1:{free_port()}"
            flags = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
            with (Path(folder) / "prometheus.log").open("wb") as prometheus_log:
                server = subprocess.Popen([binary, *flags], cwd=folder, stdout=prometheus_log, stderr=prometheus_log)

            def get(path: str) -> dict[str, Any]:
                with urllib.request.urlopen(f"http://{address}/api/v1/{path}", timeout=5) as answer:
                    return json.loads(answer.read())["data"]

            yield get
        finally:
            if server is not None:
                server.kill()
                server.wait()
            if driver.stdin is not None:
                driver.stdin.close()
            try:
                driver.wait(30)
            finally:
                driver.kill()
                log.close()


def soon(ask: Callable[[], Any]) -> Any:
    """What `ask` returns once it is true."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            if found := ask():
                return found
        except (urllib.error.URLError, ConnectionError):
            pass
        assert time.monotonic() < deadline, "Prometheus does not have it"
        time.sleep(0.5)


def query(get: Callable[[str], dict[str, Any]], expression: str) -> list[dict[str, Any]]:
    return get(f"query?query={urllib.parse.quote(expression)}")["result"]


def test_prometheus_has_the_runs_numbers_as_they_were_shown(prometheus):
    soon(lambda: query(prometheus, "ray_headrace_goodput"))
    values = {name: float(series["value"][1]) for name in OURS for series in query(prometheus, name)}
    assert values.keys() == OURS.keys(), f"not scraped: {OURS.keys() - values.keys()}"
    numbers = {name.removeprefix("ray_headrace_"): value for name, value in values.items()}
    expected = {"step": 2, "total_steps": 8, "loss": 3.5, "eval_loss": 3.75, "tokens_per_s": 2048, "mfu": 0.375, "data_wait_frac": 0.125}
    expected |= {"steps_total": 2, "tokens_total": 8192, "restarts_total": 1, "workers": 2}
    assert {name: numbers[name] for name in expected} == expected
    assert time.time() - 300 < numbers["last_progress_at_s"] < time.time() and 0 < numbers["goodput"] <= 3.5 / 60
    assert numbers["spend_dollars_total"] >= 60 * shown.WORKERS * shown.DOLLARS_PER_WORKER_HOUR / 3600
    assert numbers["dollars_per_mtok"] == pytest.approx(numbers["spend_dollars_total"] / 8192e-6, rel=0.2)
    (restarts,) = query(prometheus, "ray_headrace_restarts_total")
    assert (restarts["metric"]["run"], restarts["metric"]["cause"]) == (shown.RUN, "node lost")
    assert not [label for label in restarts["metric"] if label.startswith("otel")]


def test_prometheus_has_all_that_the_dashboard_shows_but_for_gpus(prometheus):
    wanted = set().union(*(metric_names(expression) for _, expression in expressions())) - NEEDS_A_GPU
    wanted = {name for name in wanted if not name.startswith("autoscaler_")}  # a cluster without an autoscaler
    soon(lambda: wanted <= set(prometheus("label/__name__/values")))


def test_the_rules_are_loaded_and_a_run_that_is_well_alarms_nobody(prometheus):
    rules = soon(lambda: [rule for group in prometheus("rules")["groups"] for rule in group["rules"] if rule["lastEvaluation"] > "0002"])
    assert {rule["health"] for rule in rules} == {"ok"} and {rule["state"] for rule in rules} == {"inactive"}
