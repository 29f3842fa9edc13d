"""The real command through real Ray under a memory limit; then a run with `auto`, which takes and records what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from llm.config_file import load_run
from tests.small_run import ROOT, start_run

OVERRIDES = ("parallel.workers=2", "data.seq_len=256", "train.batch_rows=128", "train.microbatch_rows=auto")
LIMIT_GIB = 0.42


def test_the_largest_micro_batch_is_found_recommended_and_taken_by_auto(recipe):
    command = [sys.executable, "-m", "jobs.cli", "tune_batch", "--config", str(recipe), "--memory-gib", str(LIMIT_GIB)]
    for override in (*OVERRIDES, "train.steps=6"):
        command += ["--set", override]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    done = subprocess.run(
        command, cwd=recipe.parent, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = recipe.parent / "runs" / "small" / "tune_batch"
    found = json.loads((folder / "tune_batch.json").read_text())
    assert 1 < found["largest_rows"] < 64 and len(found["probes"]) <= 5
    assert all(peak <= LIMIT_GIB * 2**30 for peak in found["peak_bytes"].values()), found["peak_bytes"]
    assert found["noise_scale"]["steps"] == 4 and found["noise_scale"]["low_tokens"] <= found["noise_scale"]["tokens"]
    assert f"recommended: --set {found['recommendation']['set'][0]}" in done.stdout
    page = (folder / "tune_batch.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page.replace("http-equiv", "")

    run = start_run(recipe, *OVERRIDES, "train.steps=1", "eval.rows=0", "export.enabled=false")
    out, err = run.communicate(timeout=400)
    assert run.returncode == 0, err[-3000:]
    assert f"micro-batch: {found['microbatch_rows']} rows" in out + err
    recorded = load_run(str(recipe.parent / "runs" / "small" / "config.yaml"))
    assert recorded.train.microbatch_rows == "auto"
    assert recorded.train.microbatch_rows_at_most == recorded.microbatch_rows == found["microbatch_rows"]
