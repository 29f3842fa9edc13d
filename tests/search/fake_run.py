"""Stands for `jobs.pretrain` in the tests of the search: takes a run's YAML, writes its metrics.jsonl as a run does, goes on where it was
cut.

The loss follows from the learning rate and the step alone: least at lr 1e-2. A learning rate of 0.5 fails as a run that diverges does.
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
    return 2 + abs(math.log10(lr) + 2) + 4 / (1 + step)


def main() -> int:
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    run = Path(config["run"]["storage"]) / config["run"]["name"]
    run.mkdir(parents=True, exist_ok=True)
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with (run / "begun").open("a") as begun:
        begun.write(f"{rows[-1]['step'] if rows else 0}\n")
    steps, every = config["train"]["steps"], config["eval"]["every_steps"]
    for step in range((rows[-1]["step"] if rows else 0) + 1, steps + 1):
        time.sleep(STEP_S)
        if config["train"]["lr"] == 0.5 and step > every:
            print("error: the last 3 batches could not be trained on: the loss is nan", file=sys.stderr)
            return 1
        if step % every == 0 or step == steps:
            with path.open("a") as file:
                file.write(json.dumps({"kind": "eval", "step": step, "eval_loss": loss_of(config["train"]["lr"], step)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
