from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import Nodes
from tests.small_run import ROOT, write_small_run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_small_run(tmp_path)


@pytest.fixture
def nodes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the nodes' processes import the training code
    nodes = Nodes(recipe)
    try:
        yield nodes
    finally:
        nodes.close()
