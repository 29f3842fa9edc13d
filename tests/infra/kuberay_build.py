"""What `kubectl kustomize` makes of infra/kuberay: the objects that a user applies."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
KUBERAY = REPO / "infra" / "kuberay"
SETS = {"base": "base", "small": "overlays/small", "spot": "overlays/spot", "multi-tenant": "overlays/multi-tenant"}

Manifest = dict[str, Any]


def kubectl() -> str:
    """The kubectl that the environment of development brings, else the machine's; skips the test where there is neither."""
    found = shutil.which("kubectl", path=sysconfig.get_path("scripts")) or shutil.which("kubectl")
    if found is None:
        pytest.skip("kubectl builds the overlays, and there is none here: install the extra `dev`, or kubectl")
    return found


@functools.cache
def built(name: str) -> list[Manifest]:
    """The objects of a set: one copy for all, not to be changed."""
    ran = subprocess.run([kubectl(), "kustomize", str(KUBERAY / SETS[name])], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr  # kustomize warns there of what it will drop
    return read(ran.stdout)


def read(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


def cluster_specs(manifests: list[Manifest]) -> list[tuple[tuple[str | int, ...], Manifest]]:
    """Path and spec of every Ray cluster, those inside RayJobs too."""
    found: list[tuple[tuple[str | int, ...], Manifest]] = []
    for index, manifest in enumerate(manifests):
        if manifest["kind"] == "RayCluster":
            found.append(((index, "spec"), manifest["spec"]))
        if manifest["kind"] == "RayJob":
            found.append(((index, "spec", "rayClusterSpec"), manifest["spec"]["rayClusterSpec"]))
    return found
