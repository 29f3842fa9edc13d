"""`jobs.prepare --tokens` fills the cache that the run then reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llm.config_file import load_run
from llm.data import cache as module
from llm.data.window import make_window
from llm.train.prepare import prepare
from tests.small_run import ROOT


def test_the_whole_corpus_is_packed_ahead(recipe: Path, monkeypatch):
    command = [sys.executable, "-m", "jobs.prepare", "--tokens", "--config", str(recipe), "--set", "data.slice_bytes=8192"]
    done = subprocess.run(command, cwd=recipe.parent, env={**module.os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 of 2," in done.stdout and done.stdout.count("\n") == 1 and not done.stderr
    monkeypatch.chdir(recipe.parent)
    prepared = prepare(load_run(str(recipe), ["data.slice_bytes=8192"]), "/none", 0.0)
    cache = module.token_cache(prepared.job.config)
    assert cache is not None
    monkeypatch.setattr(module, "make_slice", None)
    for window in range(prepared.recipe.plan.windows_per_epoch):
        assert len(make_window(prepared.recipe, 0, window, (), cache.slice).rows)
