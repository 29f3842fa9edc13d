"""No secret of the environment is in a single byte of what a run leaves: its folder, Ray's sessions, the terminal, the job server."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import zstandard

from tests.search.sweeps import write_sweep
from tests.token_head import Head, token_head

ROOT = Path(__file__).parents[2]
NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD")
API = ("/api/jobs/", "/api/v0/jobs?detail=1", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1", "/api/v0/workers?detail=1")
API += ("/api/v0/runtime_envs?detail=1", "/api/v0/nodes?detail=1", "/nodes?view=details", "/api/train/v2/runs/v1", "/logical/actors")
# An error as a library makes it, with what it must not tell, on a worker and in a data task: a bug that nobody has foreseen.
PLANT = """
    import logging as _logging
    import os as _os

    _told = f"403 for https://me:{_os.environ['HF_TOKEN']}@host/x?X-Amz-Signature={_os.environ['AWS_SESSION_TOKEN']}"
    _logging.getLogger("botocore").error("signing with %s", _os.environ["AWS_SECRET_ACCESS_KEY"])
    raise LookupError(_told, _os.environ["AWS_SECRET_ACCESS_KEY"])
"""
PLACES = {
    "worker": ("llm/train/worker.py", "    watchdog = _watchdog(job, mesh)\n"),
    "data": ("llm/data/stream.py", "    epoch, window = recipe.plan.nth_window(cursor, number)\n"),
}
PLANTED = {"sound": None, "worker": "worker", "data": "data", "sweep": "worker"}  # by job; of a sweep in its trial


@pytest.fixture
def canaries() -> dict[str, str]:
    return {name: f"canary{number}/{secrets.token_hex(16)}" for number, name in enumerate(NAMES)}


@pytest.fixture
def head(canaries: Mapping[str, str]) -> Iterator[Head]:
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder, token_head(Path(folder), settings=canaries) as head:
        yield head


def made_tree(folder: Path, plant: str | None = None) -> Path:
    for package in ("cluster", "llm", "jobs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    write_sweep(folder, scheduler={"kind": "none"}, budget={"trials": 1, "max_concurrent": 1}, sweep={"name": "sweep"})
    (folder / ".rayignore").write_text("runs/\n")
    if plant:
        name, line = PLACES[plant]
        text = (folder / name).read_text()
        assert text.count(line) == 1
        (folder / name).write_text(text.replace(line, PLANT + line))
    return folder


def submit(
    head: Head, tree: Path, name: str, canaries: Mapping[str, str], *more: str, job: str = "pretrain", config: str = "run.yaml"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.submit", job, "--address", head.address, "--config", config]
    for change in (f"run.storage={tree}/runs", f"run.name={name}", "log.tensorboard=true", *more):
        command += ["--set", change]
    env = {**head.environment, **canaries, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=300, check=False)


def found_in(data: bytes, needles: Mapping[str, str]) -> list[str]:
    return [name for name, value in needles.items() if value.encode() in data or value.partition("/")[2].encode() in data]


def leaks(folder: Path, needles: Mapping[str, str]) -> list[str]:
    """Which files below `folder` hold which secret."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            if path.suffix == ".zst":
                data += zstandard.ZstdDecompressor().decompressobj().decompress(data)
            found += [f"{name} in {path.relative_to(folder)}" for name in found_in(data, needles)]
    return found


def ask(head: Head, path: str) -> bytes:
    """What the server says, also where it fails."""
    request = urllib.request.Request(head.address + path, headers={"authorization": f"Bearer {head.token}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        return error.read()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", [("sound", "sweep"), pytest.param(tuple(PLANTED), marks=pytest.mark.faults)], ids=["sample", "all"])
def test_no_secret_is_left_anywhere(head: Head, canaries: dict[str, str], tmp_path: Path, names: tuple[str, ...]) -> None:
    needles = {**canaries, "RAY_AUTH_TOKEN": f"/{head.token}"}
    trees = {name: made_tree(tmp_path / name, PLANTED[name]) for name in names}
    sweep = {"sweep": {"job": "sweep", "config": "sweep.yaml"}}
    outputs = {name: submit(head, tree, name, canaries, **sweep.get(name, {})) for name, tree in trees.items()}
    told = {name: each.stdout + each.stderr for name, each in outputs.items()}
    assert {name: each.returncode for name, each in outputs.items()} == {name: int(PLANTED[name] is not None) for name in names}, told
    for name in names:
        assert ("403 for https://***@host/x?X-Amz-Signature=***" in told[name]) == (PLANTED[name] is not None), told[name]
    for name in ("sweep.jsonl", "report.html"):
        assert "403 for https://***@host/x" in (trees["sweep"] / "runs" / "sweep" / name).read_text()
    refused = submit(head, trees["sound"], "refused", canaries, f"s3.endpoint_url=http://me:{canaries['HF_TOKEN']}@host")
    assert refused.returncode == 2 and "s3.endpoint_url holds a user name or password" in refused.stderr
    secret = submit(head, trees["sound"], "secret", canaries, f"tokenizer.eos={canaries['AWS_SECRET_ACCESS_KEY']}")
    assert secret.returncode == 2 and "holds a credential" in secret.stderr

    printed = "".join([*told.values(), refused.stdout, refused.stderr, secret.stdout, secret.stderr])
    found = [f"{name} in the terminal" for name in found_in(printed.encode(), needles)]
    for path in [*API, *(f"/api/jobs/{name}" for name in trees), *(f"/api/jobs/{name}/logs" for name in trees)]:
        found += [f"{name} in {path}" for name in found_in(ask(head, path), needles)]
    assert {job["submission_id"] for job in json.loads(ask(head, "/api/jobs/")) if job["submission_id"]} == set(trees)
    for tree in trees.values():
        found += [f"{each} of a run" for each in leaks(tree, needles)]
        assert any("driver.log" in path.name for path in tree.rglob("*"))
    assert any(path.name.startswith("events.out") for path in trees["sound"].rglob("*"))
    found += [f"{each} of Ray" for each in leaks(head.folder, needles)]
    assert found == []
    logs = b"".join(path.read_bytes() for path in head.folder.rglob("logs/**/*") if path.is_file())
    assert logs.count(b"403 for https://***@host") > 2 and b"signing with ***" in logs, "Ray's logs have none of it: is the test blind?"
    assert any(path.name.startswith("job-driver-sweep") for path in head.folder.rglob("*"))
