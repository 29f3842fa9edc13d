"""`ray job submit` of the working tree to a cluster with token auth, whose Python has the dependencies but not Headrace."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = ("-m", "ray.scripts.scripts")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """An interpreter that sees the installed packages, but runs no .pth file of theirs: an editable Headrace is not there for it."""
    folder = tmp_path / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    found = subprocess.run([str(python), "-c", "import ray, torch, llm"], cwd="/", capture_output=True, text=True, check=False)
    assert "No module named 'llm'" in found.stderr
    return python


@pytest.fixture
def cluster(bare_python: Path) -> Iterator[dict[str, str]]:
    port, dashboard = free_port(), free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["PATH"] = f"{bare_python.parent}:{environment['PATH']}"
    environment.pop("PYTHONPATH", None)
    head = subprocess.Popen(
        [
            str(bare_python),
            *RAY,
            "start",
            "--head",
            "--block",
            f"--port={port}",
            "--num-cpus=4",
            "--node-ip-address=127.0.0.1",
            f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1",
            "--object-store-memory=200000000",
        ],
        cwd="/",
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    environment["RAY_API"] = f"http://127.0.0.1:{dashboard}"
    try:
        yield environment
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)


def submit(cluster: dict[str, str], recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """README's line, with another recipe."""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("ray job submit"))
    words = shlex.split(line.replace("jobs/recipes/tiny_cpu.yaml", str(recipe)))
    command = [sys.executable, *RAY, *words[1:3], "--address", cluster["RAY_API"], *words[3:]]
    command += ["--set", f"run.storage={recipe.parent}/runs"]  # the job's own folder is Ray's copy of the working tree
    for override in overrides:
        command += ["--set", override]
    return subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=400, check=False)


def wait_for(cluster: dict[str, str]) -> None:
    request = urllib.request.Request(cluster["RAY_API"] + "/api/version", headers={"authorization": f"Bearer {cluster['RAY_AUTH_TOKEN']}"})
    deadline = time.monotonic() + 90
    while True:
        try:
            return urllib.request.urlopen(request, timeout=5).close()
        except OSError:
            assert time.monotonic() < deadline, "the cluster did not come up"
            time.sleep(1)


def test_a_submitted_run_trains_and_its_exit_code_comes_back(cluster, recipe):
    wait_for(cluster)
    done = submit(cluster, recipe)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (recipe.parent / "runs" / "small" / "export" / "model.safetensors").exists()
    failed = submit(cluster, recipe, "run.name=other", "train.batch_rows=7", "parallel.workers=2")
    assert failed.returncode != 0
    assert "train.batch_rows=7" in failed.stdout + failed.stderr
    stranger = submit({**cluster, "RAY_AUTH_TOKEN": "0" * 64}, recipe)
    assert stranger.returncode != 0
