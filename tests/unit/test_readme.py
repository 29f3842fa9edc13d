"""The README's commands exist: each is parsed by the job that it names, every recipe loads, every file it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from cluster.package import inside
from jobs import doctor, jobs, submit, sweep, tune_batch
from jobs.pretrain import main as pretrain
from jobs.train_tokenizer import main as train_tokenizer
from llm.errors import ConfigError
from llm.search.sweep_config import SchedulerSection, SearchSection
from llm.search.trials import Trial

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python -m jobs\.\S+.*", README)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", [c for c in COMMANDS if "-m jobs.pretrain" in c and "--config" in c])
def test_pretrain_commands_load(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = [word for word in shlex.split(command)[3:] if word != "--print-config"]
    assert pretrain([*argv, "--print-config"]) == 0
    assert "batch_rows" in capsys.readouterr().out


def test_the_tokenizer_command_trains_one(tmp_path, monkeypatch):
    command = next(c for c in COMMANDS if "jobs.train_tokenizer" in c)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(ROOT / "runs")  # the corpus is there already
    assert train_tokenizer(shlex.split(command)[3:]) == 0
    assert Path("my-tokenizer/tokenizer.json").exists()


def test_the_sweep_command_loads_its_sweep(monkeypatch, capsys):
    command = next(c for c in COMMANDS if "jobs.sweep" in c)
    seen = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sweep, "sweep", lambda found: seen.append(found) or 0)
    assert sweep.main(shlex.split(command)[3:]) == 0, capsys.readouterr().err
    assert seen[0].file.budget.trials == 8 and seen[0].trial(Trial(0, seen[0].space.draw(0, 0))).train.steps == 60


def test_the_sweep_in_the_text_is_the_one_of_the_command():
    (block,) = re.findall(r"```yaml\n(sweep: .*?)```", README, re.DOTALL)
    told, whole = yaml.safe_load(block), yaml.safe_load((ROOT / "jobs" / "sweeps" / "tiny_cpu.yaml").read_text())
    assert told.pop("set").items() <= whole.pop("set").items()
    assert told == whole
    assert SchedulerSection.model_validate(told["scheduler"]) == SchedulerSection()
    assert SearchSection.model_validate(told["search"]) == SearchSection()


def test_the_tune_batch_command_loads_its_run(monkeypatch, capsys):
    seen = []

    def tune(config, *options):
        seen.append((config, options))
        raise ConfigError("far enough")

    command = next(c for c in COMMANDS if "jobs.tune_batch" in c)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tune_batch, "tune", tune)
    assert tune_batch.main(shlex.split(command)[3:]) == 2
    assert capsys.readouterr().err == "error: far enough\n"
    assert seen[0][0].rank_rows == 24 and seen[0][1][1:] == (None, 60, False)


def test_the_doctor_command_loads_its_run(monkeypatch, capsys):
    command = next(c for c in COMMANDS if "jobs.doctor" in c)
    seen = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(doctor, "diagnose", lambda config, *options: seen.append(config) or [])
    assert doctor.main(shlex.split(command)[3:]) == 0, capsys.readouterr().err
    assert seen[0].run.name == "tiny_cpu" and capsys.readouterr().out == "0 red, 0 yellow, 0 green\n"


def test_the_submit_command_is_one_that_would_be_sent(monkeypatch):
    command = next(c for c in COMMANDS if "jobs.submit" in c)
    seen = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(submit, "send", lambda options: seen.append(options) or 0)
    assert submit.main(shlex.split(command)[3:]) == 0
    name, files = submit.described(seen[0].job, seen[0].config, seen[0].set)
    assert name == "tiny_cpu" and all(inside(Path(), file) for file in files)


def test_the_jobs_commands_are_known(monkeypatch):
    commands = [c for c in COMMANDS if "jobs.jobs" in c]
    seen = []
    monkeypatch.setattr(jobs, "act", lambda options: seen.append(options) or 0)
    assert commands and [jobs.main(shlex.split(command)[3:]) for command in commands] == [0] * len(commands)
    assert all(options.id == "tiny_cpu" for options in seen)
    words = " ".join(README.split())
    assert all(f"`{name}" in words or f"jobs {name}" in words for name in jobs.ABOUT)


def test_every_file_that_is_named_exists():
    for name in set(re.findall(r"`((?:llm|jobs|tests|infra)/[\w/]+\.\w+)`", README)):
        assert (ROOT / name).exists(), name


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+) +#", README):
        assert f"\n{target}:" in makefile
