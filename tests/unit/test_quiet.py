"""Noise goes to the log file, errors to the user too, whenever a library sets up its console; then all is as before."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest

from llm.errors import StorageError
from llm.observe.quiet import DRIVER_ENV, NOISY_LOGGERS, quiet_ray_options, redirect_noise

# As Ray, DeepSpeed and transformers do it when they are imported: a handler on stdout or stderr, and no propagation.
A_LIBRARY = """
import logging, sys, os, warnings
def library(name, stream):
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(stream))
    logger.propagate = False
    return logger
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", A_LIBRARY + code], capture_output=True, text=True, check=True)


def test_the_driver_sees_errors_only_and_the_file_has_everything(tmp_path):
    log = tmp_path / "logs" / "driver.log"
    found = run(f"""
from llm.observe.quiet import redirect_noise
early = library("ray", sys.stderr)
with redirect_noise({str(log)!r}):
    late = library("DeepSpeed", sys.stdout)
    early.info("ray info"); late.warning("deepspeed warning"); library("ray.data", sys.stderr).warning("data warning")
    logging.getLogger("ray.train.inner").info("train info")
    warnings.warn("a python warning", FutureWarning)
    late.error("deepspeed error"); logging.getLogger("some.other").error("other error")
    print("the user's own line")
""")
    assert found.stdout == "the user's own line\n"
    assert found.stderr.splitlines() == ["ERROR DeepSpeed: deepspeed error", "ERROR some.other: other error"]
    text = log.read_text()
    for line in ("ray info", "deepspeed warning", "data warning", "train info", "a python warning", "deepspeed error"):
        assert text.count(line) == 1, line


def test_a_worker_prints_into_its_file_from_before_the_imports_on(tmp_path):
    log = tmp_path / "worker-3.log"
    found = run(f"""
from llm.observe.quiet import quiet_worker
quiet = quiet_worker({str(log)!r})
print("deepspeed prints")
os.write(1, b"a compiler prints\\n")
os.system("echo a child prints")
library("transformers", sys.stderr).warning("advice")
print("a traceback", file=sys.stderr)
print([os.environ[n] for n in ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_NO_ADVISORY_WARNINGS")])
quiet.close(); quiet.close()
print("afterwards")
""")
    assert (found.stdout, found.stderr) == ("afterwards\n", "a traceback\n")
    text = log.read_text()
    for line in ("deepspeed prints", "a compiler prints", "a child prints", "advice", "['false', '1']"):
        assert line in text


def test_everything_is_as_before_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("RAY_DATA_DISABLE_PROGRESS_BARS", raising=False)
    logger, handler = logging.getLogger("ray.tune"), logging.StreamHandler()
    loggers = [logging.getLogger(), *map(logging.getLogger, NOISY_LOGGERS)]

    def state():
        settings = [(each.__class__, each.propagate, list(each.handlers)) for each in loggers]
        return settings, warnings.showwarning, {name: os.environ.get(name) for name in DRIVER_ENV}

    before = state()
    with redirect_noise(tmp_path / "log"):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"  # what the user has set stays
        assert os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] == "1"
        logger.addHandler(handler)
        assert handler not in logger.handlers
        logger.removeHandler(handler)
    assert state() == before


def test_what_a_library_set_up_meanwhile_holds_afterwards(tmp_path):
    logger, handler = logging.getLogger("mlflow"), logging.StreamHandler()
    with redirect_noise(tmp_path / "log"):
        logger.addHandler(handler)
        logger.propagate = False
    assert logger.handlers == [handler] and logger.propagate is False
    logger.removeHandler(handler)
    logger.propagate = True


def test_a_log_file_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="log file"):
        redirect_noise(tmp_path / "file" / "driver.log")


def test_ray_forwards_no_worker_lines():
    assert quiet_ray_options()["log_to_driver"] is False
