from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_run import write_small_run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_small_run(tmp_path)
