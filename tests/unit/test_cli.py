"""The console script finds the job, says what it does not know, and refuses to run with another project's packages."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from jobs import cli
from llm.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]


def install_job(monkeypatch: pytest.MonkeyPatch, name: str, main) -> None:
    module = types.ModuleType(f"jobs.{name}")
    vars(module)["main"] = main
    monkeypatch.setitem(sys.modules, f"jobs.{name}", module)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]])
def test_help_names_every_job(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"  {job} " in out for job in cli.JOBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("headrace ")


def test_unknown_command_names_the_nearest_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrian", "--config", "x.yaml"]) == 2
    assert "unknown command 'pretrian'. Nearest: pretrain." in capsys.readouterr().err
    assert cli.main(["zzz"]) == 2
    assert "Nearest" not in capsys.readouterr().err


@pytest.mark.parametrize(("command", "module"), [("train-tokenizer", "train_tokenizer"), ("train_tokenizer", "train_tokenizer")])
def test_the_job_gets_the_rest_and_gives_the_exit_status(command: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    install_job(monkeypatch, module, main)
    assert cli.main([command, "--help"]) == 7
    assert seen == [["--help"]]


def test_only_the_chosen_job_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    install_job(monkeypatch, "prepare", lambda argv: 0)
    before = set(sys.modules)
    assert cli.main(["prepare"]) == 0
    assert {name for name in set(sys.modules) - before if name.startswith("jobs.")} == set()


def test_a_users_error_is_one_message_and_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        raise ConfigError("a.yaml has 1 problem:\n  train.lr=-1 must be a number above 0")

    install_job(monkeypatch, "prepare", main)
    assert cli.main(["prepare"]) == 2
    assert capsys.readouterr().err == "ConfigError: a.yaml has 1 problem:\n  train.lr=-1 must be a number above 0\n"


def test_packages_of_one_checkout_pass() -> None:
    assert cli.mixed_checkouts() is None


def test_another_projects_llm_is_refused_before_it_is_imported(tmp_path: Path) -> None:
    other = tmp_path / "llm"
    other.mkdir()
    (other / "__init__.py").write_text("raise RuntimeError('imported')\n")
    # The other llm is first on the path, as an installed package of that name can be; jobs and cluster are ours.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    code = "from jobs.cli import main; raise SystemExit(main(['pretrain']))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert f"llm in {tmp_path}" in ran.stderr
    assert "must come from one checkout" in ran.stderr
    assert "Traceback" not in ran.stderr


TIDIES_UP = """
import sys, time
from jobs.exit_code import exit_code_of

def act():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.5)
        print("tidied up", flush=True)

sys.exit(exit_code_of(act, "it goes on"))
"""


def test_a_signal_that_comes_twice_at_once_does_not_cut_short_how_a_job_ends() -> None:
    job = subprocess.Popen([sys.executable, "-c", TIDIES_UP], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    for _ in range(2):  # as timeout(1) does
        job.terminate()
        time.sleep(0.1)
    assert (*job.communicate(timeout=30), job.returncode) == ("tidied up\n", "interrupted: it goes on\n", 130)
