"""Who has no token, or another, gets nothing from any port of a head as infra starts it: neither by HTTP nor by gRPC."""

from __future__ import annotations

import time

import pytest

from cluster.job_server import JobServer
from tests.infra.probes import Answer, grpc_answers, http_answers, listening, methods, routes
from tests.infra.ray_up_head import ShippedHead, shipped_head

# By design: pages without data, with which a browser asks for the token, and whether a process is well. What they say is in the test.
PAGES = ("GET /", "GET /favicon.ico")
# gRPC's own services, which Ray puts into every server: whether one is there, and the shapes of Ray's published methods.
OF_GRPC = ("/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
SAYS_LITTLE = {
    "GET /api/authentication_mode": ('{"authentication_mode": "token"}', '{"authentication_mode":"token"}'),
    "GET /api/healthz": ("raylet: success\ngcs: success",),
    "GET /api/gcs_healthz": ("success",),
    "GET /api/local_raylet_healthz": ("success",),
}
# Prometheus' (infra/monitoring), on which Ray's own exporter serves any path: a network policy or security group keeps strangers away.
EXPORTERS = ("agent", "autoscaler", "dashboard")
CLOSING = {"RAY_enable_metrics_collection": "0", "AUTOSCALER_METRIC_PORT": "-1", "DASHBOARD_METRIC_PORT": "-1"}
DRIVER = "import ray, time; ray.init(); actor = ray.remote(type('Actor', (), {'ping': lambda self: 1})).options(num_cpus=0).remote(); "
DRIVER += "print('pong', ray.get(actor.ping.remote()), flush=True); time.sleep(600)"


def test_there_is_something_to_ask() -> None:
    assert ("GET", "/api/jobs/") in routes() and ("POST", "/api/jobs/") in routes() and len(routes()) > 60
    names = [name for name, _ in methods()]
    assert "/ray.rpc.InternalKVGcsService/InternalKVGet" in names and "/ray.rpc.CoreWorkerService/PushTask" in names and len(names) > 130


@pytest.mark.timeout(500)
@pytest.mark.parametrize("metrics", ["metrics", pytest.param("no metrics", marks=pytest.mark.faults)])
def test_strangers_get_nothing(metrics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with shipped_head(CLOSING if metrics == "no metrics" else None) as head:
        assert head.status(head.token) == 200
        run_a_driver(head, monkeypatch)
        ports = listening(head.folder)
        assert {"gcs", "raylet", "agent", "dashboard", "worker", "runtime environments"} <= {port.process for port in ports}
        answers = [
            answer for port in ports for token in (None, "0" * 64) for ask in (http_answers, grpc_answers) for answer in ask(port, token)
        ]
        assert head.status(head.token) == 200, "probing has broken it"
    exporters = {answer.port: answer.process for answer in answers if is_metrics(answer)}
    assert sorted(exporters.values()) == ([] if metrics == "no metrics" else sorted(EXPORTERS))
    if metrics == "metrics":
        assert exporters[head.ports["metrics-export-port"]] == "agent"
    found = [
        answer for answer in answers if not (answer.port in exporters and tells_no_more_than_metrics(answer)) and not is_harmless(answer)
    ]
    assert found == [], "\n".join(map(str, found))
    assert [answer.port for answer in answers if answer.asked == "GET /"] != [], "the probes see nothing"


def is_metrics(answer: Answer) -> bool:
    return answer.asked == "GET /made-up" and answer.status == "200" and answer.body.startswith("# HELP ")


def tells_no_more_than_metrics(answer: Answer) -> bool:
    """An exporter serves them on every path but that of an icon, which is empty, and refuses what is no GET."""
    is_given = answer.status == "OK" or answer.status.startswith("2")
    return answer.body.startswith("# HELP ") or not answer.body or not is_given


def is_harmless(answer: Answer) -> bool:
    if answer.asked in OF_GRPC:
        return True
    if answer.asked in PAGES:
        return answer.process == "dashboard"
    return answer.body in SAYS_LITTLE.get(answer.asked, ())


def run_a_driver(head: ShippedHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are a driver's and a worker's ports too."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    server = JobServer(head.address)
    server.submit("waits", f'exec python -c "{DRIVER}"', {}, {})
    deadline = time.monotonic() + 120
    while "pong 1" not in (log := server.log("waits")):
        assert time.monotonic() < deadline and not server.job("waits").ended, log
        time.sleep(1)
