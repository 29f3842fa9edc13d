from __future__ import annotations

import json
from pathlib import Path

import pytest

RECIPE = """
run:        {{name: small, storage: {folder}/runs}}
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


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small run on a small corpus, all of it under `tmp_path`; 3 of its 3,000 records are unreadable."""
    from llm.tokenizer import save_tokenizer, train_tokenizer

    texts = [f"sentence {i} speaks of {i * 7} things, and of {i % 13} others" for i in range(3000)]
    (tmp_path / "corpus").mkdir()
    for part in range(4):
        lines = [json.dumps({"text": t}).encode() + b"\n" for t in texts[part::4]]
        if part < 3:
            lines[5] = b'{"text": "\xff"}\n'
        (tmp_path / "corpus" / f"{part}.jsonl").write_bytes(b"".join(lines))
    save_tokenizer(train_tokenizer(iter(texts), "bpe", 400), tmp_path / "tokenizer")
    path = tmp_path / "run.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path
