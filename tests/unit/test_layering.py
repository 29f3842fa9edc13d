"""Who may import whom: the contracts in pyproject.toml hold, they bite, and light modules are light when imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# By design (DESIGN.md): what plans, names and orders can be imported where no torch is installed.
TORCH_FREE = [
    "llm.config",
    "llm.config_changes",
    "llm.config_fields",
    "llm.config_file",
    "llm.config_problems",
    "llm.errors",
    "llm.state",
    "llm.metrics",
    "llm.observe",
    "llm.data.order",
    "llm.data.pack",
    "llm.parallel.mesh",
    "llm.redact",
    "llm.checkpoint.layout",
    "llm.checkpoint.index",
    "llm.checkpoint.manifest",
    "llm.checkpoint.newest",
    "llm.checkpoint.on_disk",
    "llm.checkpoint.on_s3",
    "llm.checkpoint.published",
    "llm.checkpoint.start",
    "llm.checkpoint.store",
    "llm.checkpoint.strict_json",
    "llm.model.flops",
    "llm.model.presets",
    "llm.train.schedule",
    "jobs.cli",
]

VIOLATIONS = {
    "llm/errors.py": "import torch\nimport cluster\n",
    "cluster/offender.py": "import torch\n",
    "llm/tokenizer_offender.py": "import llm.train.schedule\nimport ray\nimport deepspeed\n",
}


def lint(folder: Path) -> str:
    """What import-linter says about `folder`; a process of its own, because it imports the packages by their names."""
    code = """if True:
        from importlinter import configuration
        from importlinter.application.use_cases import lint_imports

        configuration.configure()
        print("kept" if lint_imports(cache_dir=None, no_logo=True) else "broken")
    """
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_every_import_contract_is_kept() -> None:
    told = lint(REPO)
    assert told.rstrip().endswith("kept"), told


def test_every_import_contract_bites(tmp_path: Path) -> None:
    for package in ("cluster", "llm", "jobs"):
        shutil.copytree(REPO / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    for name, text in VIOLATIONS.items():
        place = tmp_path / name
        place.write_text((place.read_text() if place.exists() else "") + "\n" + text)
    told = lint(tmp_path)
    for contract in contracts():
        assert f"{contract['name']} BROKEN" in " ".join(told.split()), told


def test_every_torch_free_module_that_exists_is_in_the_contract() -> None:
    listed = next(c for c in contracts() if c["name"] == "what plans, names and orders needs no torch")["source_modules"]
    paths = {name: REPO / name.replace(".", "/") for name in TORCH_FREE}
    existing = {name for name, path in paths.items() if path.is_dir() or path.with_suffix(".py").exists()}
    assert existing - set(listed) == set(), "add these to the contract in pyproject.toml"


@pytest.mark.parametrize("module", ["llm.config_file", "jobs.cli", "cluster"])
def test_importing_it_loads_no_heavy_library(module: str) -> None:
    heavy = {"torch", "ray", "transformers", "deepspeed", "numpy", "pyarrow"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


def contracts() -> list[dict]:
    return tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
