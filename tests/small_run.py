"""A run that real Ray finishes in a minute: a tiny model on a small corpus, 3 of whose 3,000 records are unreadable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

RECIPE = """
run:        {{name: small, storage: runs}}
model:
  preset: llama_1m
  config: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}}
tokenizer:  {{path: {folder}/tokenizer}}
data:       {{seq_len: 32, windows_ahead: 1, sources: [{{name: made, uri: "{folder}/corpus/*.jsonl"}}]}}
parallel:   {{workers: 1}}
train:      {{steps: 6, batch_rows: 8, microbatch_rows: 2, lr: 1.0e-2, precision: fp32}}
checkpoint: {{every_steps: 3}}
eval:       {{every_steps: 3, rows: 8}}
"""


def write_small_run(folder: Path) -> Path:
    """The recipe `folder/run.yaml`, with its corpus and tokenizer beside it."""
    from llm.tokenizer import save_tokenizer, train_tokenizer

    texts = [f"sentence {i} speaks of {i * 7} things, and of {i % 13} others" for i in range(3000)]
    (folder / "corpus").mkdir()
    for part in range(4):
        lines = [json.dumps({"text": t}).encode() + b"\n" for t in texts[part::4]]
        if part < 3:
            lines[5] = b'{"text": "\xff"}\n'
        (folder / "corpus" / f"{part}.jsonl").write_bytes(b"".join(lines))
    save_tokenizer(train_tokenizer(iter(texts), "bpe", 400), folder / "tokenizer")
    path = folder / "run.yaml"
    path.write_text(RECIPE.format(folder=folder))
    return path


def start_run(recipe: Path, *overrides: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`jobs.pretrain` as a user starts it, in the recipe's folder: `run.storage: runs` is there. `before`: a command that starts it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [*before, sys.executable, "-m", "jobs.pretrain", "--config", str(recipe)]
    for override in overrides:
        command += ["--set", override]
    return subprocess.Popen(command, cwd=recipe.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
