"""What ASHA finds, and for how many tokens, beside the full random search over the same settings.

    python -m tests.bench.sweep [--seeds 5] [--trials 27] [--steps 126]

Learning rate (over three decades) and width of a model of the tests on their corpus. Both searches go through the product's `jobs.sweep`
and Ray Tune; each trial is trained by its loop in a process of its own (see sweep_trial.py). Tokens are those of every step that was
trained. The bar: within 2% of the best loss for at most 0.35 of the tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from llm.metrics import read_rows, rows_of
from tests.bench.sweep_trial import warm_server
from tests.search.sweeps import start_sweep, write_sweep

COMMAND = (sys.executable, "-m", "tests.bench.sweep_trial")
SPACE = {"train.lr": {"loguniform": [1e-4, 1e-1]}, "model.config.hidden_size": {"choice": [16, 32, 64]}}
SETTINGS = {
    "train.batch_rows": 16,
    "train.schedule": "constant",
    "checkpoint.every_steps": 0,
    "eval.rows": 64,
    "export.enabled": False,
    "log.tensorboard": False,
}


@dataclass(frozen=True)
class Found:
    loss: float
    tokens: int
    seconds: float
    lr: float


def search(kind: str, seed: int, trials: int, steps: int) -> Found:
    with tempfile.TemporaryDirectory() as folder, warm_server(Path(folder)) as server:
        scheduler = {"kind": kind, "first_frac": 1 / 9, "reduction": 3}
        path = write_sweep(
            Path(folder),
            sweep={"name": "search", "seed": seed},
            set={**SETTINGS, "train.steps": steps, "eval.every_steps": max(1, steps // 9)},
            space=SPACE,
            scheduler=scheduler,
            budget={"trials": trials, "max_concurrent": 2},
        )
        began_s = time.monotonic()
        process = start_sweep(path, command=(*COMMAND, str(server)), OMP_NUM_THREADS="1")
        out, err = process.communicate()
        if process.returncode:
            raise SystemExit(f"the sweep failed:\n{out[-3000:]}\n{err[-3000:]}")
        seconds = time.monotonic() - began_s
        runs = sorted((Path(folder) / "runs" / "search" / "trials").iterdir())
        rows = [read_rows(run / "metrics.jsonl") for run in runs if (run / "metrics.jsonl").exists()]
        config = yaml.safe_load((Path(folder) / "runs" / "search" / "best.yaml").read_text())
        of_a_step = config["train"]["batch_rows"] * config["data"]["seq_len"]
        tokens = sum(len(rows_of(each, "step")) for each in rows) * of_a_step
        ends = [rows_of(each, "eval")[-1]["eval_loss"] for each in rows if rows_of(each, "eval")[-1]["step"] == steps]
        return Found(min(ends), tokens, seconds, config["train"]["lr"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=27)
    parser.add_argument("--steps", type=int, default=126)
    options = parser.parse_args()
    worse, share = [], []
    for seed in range(options.seeds):
        full, asha = (search(kind, seed, options.trials, options.steps) for kind in ("none", "asha"))
        worse.append(asha.loss / full.loss - 1)
        share.append(asha.tokens / full.tokens)
        print(
            f"seed {seed}: full {full.loss:.4f} (lr {full.lr:.2g}, {full.tokens:,} tokens, {full.seconds:.0f} s), "
            f"ASHA {asha.loss:.4f} (lr {asha.lr:.2g}, {asha.seconds:.0f} s): {worse[-1]:+.2%} for {share[-1]:.3f} of the tokens",
            flush=True,
        )
    met = max(worse) <= 0.02 and statistics.mean(share) <= 0.35
    print(f"worst {max(worse):+.2%}, mean share of the tokens {statistics.mean(share):.3f}: {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
