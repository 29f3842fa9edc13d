"""Stands for `jobs.pretrain` in the tests of the search: takes a run's YAML, writes its metrics.jsonl as a run does, goes on where it was
cut, pauses where it is told to, and starts from what another one had come to.

The loss is what is left of 4 after every step took a share of it, the more the nearer the learning rate is to 1e-2. One of 0.5 fails as a
run that diverges does.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

import yaml

STEP_S = float(os.environ.get("FAKE_STEP_S", "0.02"))


def loss_of(lr: float, step: int) -> float:
    return after(4.0, lr, step) + 2


def after(left: float, lr: float, steps: int) -> float:
    return left * (1 - 0.1 / (1 + abs(math.log10(lr) + 2))) ** steps


def main() -> int:
    began_s = time.time()
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    run = Path(config["run"]["storage"]) / config["run"]["name"]
    run.mkdir(parents=True, exist_ok=True)
    path, lr = run / "metrics.jsonl", config["train"]["lr"]
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    evals = [row for row in rows if row["kind"] == "eval"]
    first, left = (evals[-1]["step"], evals[-1]["eval_loss"] - 2) if evals else started(config)
    with (run / "begun").open("a") as begun:
        begun.write(f"{first}\n")
    steps, every = config["train"]["until_step"] or config["train"]["steps"], config["eval"]["every_steps"]
    for step in range(first + 1, steps + 1):
        time.sleep(STEP_S)
        if lr == 0.5 and step > every:
            print("error: the last 3 batches could not be trained on: the loss is nan", file=sys.stderr)
            return 1
        left = after(left, lr, 1)
        if step % every == 0 or step == steps:
            with path.open("a") as file:
                file.write(json.dumps({"kind": "eval", "step": step, "eval_loss": left + 2}) + "\n")
                took = {"elapsed_s": time.time() - began_s, "written_at_s": time.time()}
                file.write(json.dumps({"kind": "event", "event": "checkpoint", "step": step, **took}) + "\n")
            kept = run / "checkpoints" / f"step-{step:08d}"
            kept.mkdir(parents=True, exist_ok=True)
            (kept / "left").write_text(str(left))
    return 0


def started(config: dict) -> tuple[int, float]:
    kept = config["checkpoint"]["start_from"]
    return (int(kept[-8:]), float((Path(kept) / "left").read_text())) if kept else (0, 4.0)


if __name__ == "__main__":
    sys.exit(main())
