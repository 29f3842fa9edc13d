"""`headrace submit` and `headrace jobs` against a head with token auth, whose Python has the dependencies but not Headrace."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.small_run import write_small_run
from tests.token_head import Head, token_head

ROOT = Path(__file__).parents[2]


def bare_python(folder: Path) -> Path:
    """An interpreter that sees the installed packages, but runs no .pth file of theirs: an editable Headrace is not there for it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([str(python), "-c", "import ray, torch, llm"], cwd="/", env=bare, capture_output=True, text=True, check=False)
    assert "No module named 'llm'" in found.stderr
    return python


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    python = bare_python(tmp_path_factory.mktemp("bare") / "python")
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder, token_head(Path(folder), python) as head:
        yield head


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as a user has it: the code, and a configuration beside it."""
    folder = tmp_path_factory.mktemp("tree")
    for package in ("cluster", "llm", "jobs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitignore", folder)
    write_small_run(folder)
    return folder


def headrace(command: str, tree: Path, environment: dict[str, str], wait_s: float = 300) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", *shlex.split(command)]
    env = {**environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=tree, env=env, capture_output=True, text=True, timeout=wait_s, check=False)


def submit(head: Head, tree: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """README's line, with another recipe. What Ray would ask instead of the address that was named is nobody's."""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if "jobs.submit" in line)
    words = shlex.split(line)[2:]
    words[words.index("--address") + 1], words[words.index("--config") + 1] = head.address, "run.yaml"
    words[words.index("--set") + 1] = f"run.storage={tree}/runs"
    elsewhere = {"RAY_ADDRESS": "127.0.0.1:1", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    return headrace(shlex.join([*words, *more]), tree, {**head.environment, **elsewhere, **environment})


def test_a_submitted_run_trains_and_its_log_and_exit_code_come_back(head: Head, tree: Path) -> None:
    done = submit(head, tree)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("eval at step 6") == done.stdout.count("status            finished") == 1
    assert (tree / "runs" / "small" / "export" / "model.safetensors").exists()
    failed = submit(head, tree, "--set", "run.name=other", "--set", "data.sources.0.uri=no_such_folder")
    assert failed.returncode == 2
    assert "other: failed with exit code 2" in failed.stderr and "no_such_folder" in failed.stdout
    listed = headrace(f"jobs.jobs list --address {head.address}", tree, dict(head.environment))
    assert [line.split()[:3] for line in listed.stdout.splitlines()[1:]] == [["small", "succeeded", "0"], ["other", "failed", "2"]], (
        listed.stdout
    )


def test_strangers_are_refused_and_nothing_is_sent(head: Head, tree: Path) -> None:
    wrong = submit(head, tree, "--id", "stranger", RAY_AUTH_TOKEN="0" * 64)
    assert (wrong.returncode, "refuses this client's token" in wrong.stderr) == (3, True), wrong.stderr
    without = submit(head, tree, "--id", "stranger", RAY_AUTH_TOKEN="")
    assert (without.returncode, "wants a token, and there is none here" in without.stderr) == (3, True), without.stderr
    found = headrace(f"jobs.jobs status stranger --address {head.address}", tree, dict(head.environment))
    assert (found.returncode, "stranger does not exist" in found.stderr) == (3, True), found.stderr


def test_a_job_that_is_stopped_while_it_starts_leaves_nothing_and_goes_on_when_it_is_submitted_again(head: Head, tree: Path) -> None:
    long = ["--set", "run.name=long", "--set", "train.steps=100000", "--no-wait"]
    assert submit(head, tree, *long).returncode == 0
    again = submit(head, tree, *long)
    assert again.returncode == 0 and "long: the same command and files run already" in again.stdout, again.stdout + again.stderr
    changed = submit(head, tree, *long, "--set", "train.lr=1e-3")
    assert (changed.returncode, "with another command or other files. Stop it first" in changed.stderr) == (3, True), changed.stdout
    stopped = headrace(f"jobs.jobs stop long --address {head.address}", tree, dict(head.environment))
    assert (stopped.returncode, stopped.stdout) == (0, "long: has ended (stopped)\n"), stopped.stderr
    assert training_of(tree) == []
    following = submit(head, tree, "--set", "run.name=long")
    assert following.returncode == 0 and following.stdout.startswith("long-2: submitted"), following.stdout[-2000:] + following.stderr


def training_of(tree: Path) -> list[int]:
    """The processes of jobs of this test: their command names its storage."""
    found = []
    for process in psutil.process_iter():
        try:
            if f"run.storage={tree}/runs" in process.cmdline():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
