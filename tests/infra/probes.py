"""What the ports of a Ray answer to one who asks every HTTP route and every gRPC method that Ray has."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import requests

OURS = "/made-up"
# Two services of Ray whose Python stubs it does not ship, and what any gRPC server may offer.
MORE_METHODS = (
    ("/ray.rpc.ObjectManagerService/Push", False),
    ("/ray.rpc.ObjectManagerService/Pull", False),
    ("/ray.rpc.ObjectManagerService/FreeObjects", False),
    ("/grpc.health.v1.Health/Check", False),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", True),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", True),
)
CLOSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)


@dataclass(frozen=True)
class Listening:
    process: str
    host: str
    port: int


@dataclass(frozen=True)
class Answer:
    """What came from a port where nothing should: `status` of HTTP, or of gRPC by its name."""

    process: str
    port: int
    asked: str
    status: str
    body: str


def listening(folder: str) -> list[Listening]:
    """Every TCP port of the processes that have files of a Ray in `folder` open, or its name on their command line."""
    found: dict[int, Listening] = {}
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if folder not in line and not any(each.path.startswith(folder) for each in process.open_files()):
                continue
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    host = each.laddr.ip.removeprefix("::ffff:")
                    any_host = host in ("::", "0.0.0.0")
                    found[each.laddr.port] = Listening(_name(line), "127.0.0.1" if any_host else host, each.laddr.port)
        except psutil.Error:
            continue
    return sorted(found.values(), key=lambda each: each.port)


def routes() -> list[tuple[str, str]]:
    """Every (method, path) that Ray's dashboard, its modules and its agents declare, and some that nobody does."""
    import ray

    found = {("GET", "/metrics"), ("GET", OURS), ("GET", "/static/%2e%2e/%2e%2e/index.html"), ("GET", "//api/version")}
    for source in (Path(ray.__file__).parent / "dashboard").rglob("*.py"):
        for method, path in re.findall(r'routes\.(get|post|put|delete|patch)\(\s*"([^"]+)"', source.read_text()):
            found.add((method.upper(), re.sub(r"\{\w+\}", "made-up", path)))
    return sorted(found)


def methods() -> list[tuple[str, bool]]:
    """Every gRPC method of Ray's services, and whether it answers with a stream."""
    import ray.core.generated as generated

    found = list(MORE_METHODS)
    for module in pkgutil.walk_packages(generated.__path__, "ray.core.generated."):
        if module.name.endswith("_pb2"):
            for service in importlib.import_module(module.name).DESCRIPTOR.services_by_name.values():
                found += [(f"/{service.full_name}/{each.name}", each.client_streaming or each.server_streaming) for each in service.methods]
    return sorted(set(found))


def http_answers(port: Listening, token: str | None) -> Iterator[Answer]:
    """The answers that are neither refusals (401, 403) nor say that there is nothing (404, 405)."""
    session = requests.Session()
    session.trust_env = False
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for method, path in routes():
        try:
            got = session.request(method, f"http://{port.host}:{port.port}{path}", headers=headers, timeout=10, allow_redirects=False)
        except requests.RequestException:
            if path == OURS:
                return  # whoever does not speak HTTP does so on no path
            continue
        if got.status_code not in (401, 403, 404, 405):
            yield Answer(port.process, port.port, f"{method} {path}", str(got.status_code), got.text[:200])


def grpc_answers(port: Listening, token: str | None) -> Iterator[Answer]:
    """The answers other than that the caller is not known, or the method is not there."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(f"{port.host}:{port.port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=3)
        except grpc.FutureTimeoutError:
            return
        for method, streams in methods():
            try:
                if streams:
                    next(iter(channel.stream_stream(method)(iter([b""]), metadata=metadata, timeout=5)), b"")
                else:
                    channel.unary_unary(method)(b"", metadata=metadata, timeout=5)
                yield Answer(port.process, port.port, method, "OK", "")
            except grpc.RpcError as error:
                assert isinstance(error, grpc.Call)
                if error.code() not in CLOSED:
                    yield Answer(port.process, port.port, method, error.code().name, (error.details() or "")[:200])


def _name(line: str) -> str:
    """A short name for one of Ray's processes, by its command line."""
    program = line.split(maxsplit=1)[0] if line else ""
    if program.endswith(("raylet", "gcs_server")):  # what they start is on their command lines
        return "raylet" if program.endswith("raylet") else "gcs"
    for mark, name in (
        ("monitor.py", "autoscaler"),
        ("util.client.server", "client server"),
        ("dashboard/dashboard.py", "dashboard"),
        ("DashboardAgent", "agent"),
        ("dashboard/agent.py", "agent"),
        ("RuntimeEnvAgent", "runtime environments"),
        ("runtime_env/agent", "runtime environments"),
    ):
        if mark in line:
            return name
    return "worker"
