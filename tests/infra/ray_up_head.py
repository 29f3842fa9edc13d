"""The head's command of infra/ray_up as shipped, but for the image's PATH, ports of this machine, and Ray's list of nodes to start."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.infra.test_ray_up_policies import RAY_UP, load
from tests.ports import free_port

FILES = sorted(path.stem for path in RAY_UP.glob("*.yaml"))
# Ports of Ray that the command leaves as they are, and that only one Ray of a machine can have.
MORE_PORTS = ("dashboard-agent-listen-port", "ray-client-server-port")
METRICS_PORTS = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")
PORTS = ("port", "object-manager-port", "metrics-export-port", "dashboard-port")


@dataclass(frozen=True)
class ShippedHead:
    """`ports`: by the options of `ray start`; `folder`: on the command lines of all its processes."""

    ports: Mapping[str, int]
    token: str
    folder: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.ports['dashboard-port']}"

    def status(self, token: str) -> int:
        """Of the job server's answer to one with this token, once there is a job server."""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"{self.address}/api/version", headers=headers)
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                return error.code
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text(errors="replace")[-2000:]
                time.sleep(0.5)


@contextlib.contextmanager
def shipped_head(settings: Mapping[str, str] | None = None) -> Iterator[ShippedHead]:
    """`settings`: variables of the head besides those of the file."""
    shipped = load("aws")
    assert all(load(file)["head_start_ray_commands"] == shipped["head_start_ray_commands"] for file in FILES)
    (command,) = [command for command in shipped["head_start_ray_commands"] if "ray start" in command]
    ports = {name: free_port() for name in PORTS}
    for name, port in ports.items():
        command, changed = re.subn(rf"--{name}=\d+", f"--{name}={port}", command)
        assert changed == 1
    command, _, rest = command.replace("/opt/headrace/bin", str(Path(sys.executable).parent)).partition("--autoscaling-config=")
    assert rest == "~/ray_bootstrap_config.yaml"
    command += " ".join(f"--{name}={free_port()}" for name in MORE_PORTS)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets are in it
        token, log = Path(folder) / "token", Path(folder) / "log"
        token.write_text(secrets.token_hex(32))
        options = [option.removeprefix("--env=").partition("=") for option in shipped["docker"]["run_options"] if "--env=" in option]
        environment = {**os.environ, **{name: value for name, _, value in options}, "RAY_AUTH_TOKEN_PATH": str(token)}
        environment |= {name: str(free_port()) for name in METRICS_PORTS} | dict(settings or {})
        with log.open("wb") as output:
            words = ["bash", "-c", f"{command} --temp-dir={folder}/ray --block"]
            head = subprocess.Popen(words, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            yield ShippedHead(ports, token.read_text(), folder, head, log)
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(40)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
