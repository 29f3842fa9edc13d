"""Sweeps of made-up runs through the real search in Ray Tune."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.small_run import ROOT, write_small_run

FAKE = (sys.executable, "-m", "tests.search.fake_run")
DRIVER = """
import sys
from jobs import sweep
sweep.TRIAL_COMMAND = tuple(sys.argv[1].split())
sys.exit(sweep.main(sys.argv[2:]))
"""


def write_sweep(folder: Path, **sections: Any) -> Path:
    """A sweep file beside the small run's recipe."""
    write_small_run(folder)
    told = {
        "sweep": {"name": "search"},
        "run": "run.yaml",
        "set": {"train.steps": 27, "eval.every_steps": 0},
        "space": {"train.lr": {"loguniform": [1e-4, 1.0]}},
        "scheduler": {"first_frac": 0.12},
        "budget": {"trials": 6, "max_concurrent": 2},
        **sections,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(told))
    return path


def start_sweep(path: Path, *overrides: str, command: tuple[str, ...] = FAKE, **environment: str) -> subprocess.Popen[str]:
    """`jobs.sweep` as a user starts it, but for the command that a trial runs."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    arguments = [sys.executable, "-c", DRIVER, " ".join(command), "--config", str(path)]
    for override in overrides:
        arguments += ["--set", override]
    return subprocess.Popen(
        arguments,
        cwd=path.parent,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
