"""What a user gets wrong is one short error on stderr and an exit code, before Ray starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from jobs.pretrain import main
from llm.tokenizer import save_tokenizer, train_tokenizer

RECIPE = """
run:       {{name: bad, storage: {folder}/runs}}
model:     {{preset: llama_1m}}
tokenizer: {{path: {folder}/tokenizer}}
data:      {{seq_len: 16, sources: [{{name: made, uri: "{folder}/*.jsonl"}}]}}
parallel:  {{workers: 2}}
train:     {{steps: 2, batch_rows: 8, lr: 1.0e-3}}
eval:      {{rows: 4}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    texts = [f"a sentence about number {i} and nothing else" for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    save_tokenizer(train_tokenizer(iter(texts), "bpe", 300), tmp_path / "tokenizer")
    path = tmp_path / "run.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


CASES = {
    "unknown key": (["train.stesp=3"], ["train.stesp", "train.steps"]),
    "impossible batch": (["train.batch_rows=7"], ["train.batch_rows=7", "Nearest legal values: 6, 8, 10"]),
    "missing file": (["data.sources.0.uri=/nowhere/a.jsonl"], ["/nowhere/a.jsonl"]),
    "tensor does not divide heads": (["parallel.workers=3", "parallel.tensor=3", "train.batch_rows=8"], ["3"]),
    "gpt2 cannot be split": (["model.preset=gpt2_124m", "parallel.tensor=2", "data.seq_len=16"], ["gpt2", "tensor"]),
    "wrong tokenizer": (["tokenizer.path={folder}/a.jsonl"], ["tokenizer"]),
    "no such preset": (["model.preset=llama_1mm"], ["llama_1m"]),
    "no such config": (None, ["There is no config file"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_named_error(case, recipe, capsys):
    overrides, expected = CASES[case]
    argv = ["--config", str(recipe) if overrides is not None else "/nowhere/run.yaml"]
    for override in overrides or []:
        argv += ["--set", override.format(folder=recipe.parent)]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "Traceback" not in told
    for part in expected:
        assert part in told


def test_an_empty_corpus_is_refused(recipe, capsys):
    (recipe.parent / "a.jsonl").write_text('{"text": ""}\n' * 50)
    assert main(["--config", str(recipe)]) == 2
    assert "empty" in capsys.readouterr().err


def test_a_corrupt_zst_with_nothing_else_is_refused(recipe, capsys):
    good = zstandard.compress(b'{"text": "some text"}\n' * 1000)
    (recipe.parent / "broken.jsonl.zst").write_bytes(b"\0" * len(good))
    assert main(["--config", str(recipe), "--set", f"data.sources.0.uri={recipe.parent}/broken.jsonl.zst"]) == 2
    assert "broken.jsonl.zst" in capsys.readouterr().err


def test_print_config_prints_and_trains_nothing(recipe, capsys):
    assert main(["--config", str(recipe), "--print-config", "--set", "train.lr=0.5"]) == 0
    assert "lr: 0.5" in capsys.readouterr().out
    assert not (recipe.parent / "runs").exists()
