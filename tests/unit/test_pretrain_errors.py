"""What a user gets wrong is one short error on stderr and an exit code, before Ray starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from jobs.pretrain import main
from llm.checkpoint.store import CheckpointStore
from llm.config_file import load_run
from llm.tokenizer import save_tokenizer, train_tokenizer
from llm.train.runs import record_config
from tests.made_checkpoint import publish

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


START = {
    "another lr is fine, and then no step is left": (["train.lr=0.5"], ["holds 2 steps already", "train.steps=2"]),
    "another seed": (["train.steps=9", "run.seed=5"], ["run.seed: 0 -> 5", "weights or stream are other ones"]),
    "another width": (["train.steps=9", "model.config.hidden_size=32"], ["model.config.hidden_size"]),
    "another batch": (["train.steps=9", "train.batch_rows=16"], ["train.batch_rows: 8 -> 16"]),
    "another optimizer": (["train.steps=9", "train.optimizer=sgd"], ["optimizer=adamw there, sgd here"]),
    "other rows held out": (["train.steps=9", "eval.rows=8"], ["eval.rows: 4 -> 8"]),
    "no such step": (["train.steps=9", "checkpoint.start_from={run}/checkpoints/step-00000007"], ["is not there", "step-00000002"]),
    "no checkpoint": (["checkpoint.start_from={run}"], ["is no checkpoint of a run", "RUN/checkpoints/step-00000096"]),
    "other text": (["train.steps=9", "data.sources.0.uri={run}/../../a.jsonl"], ["data.sources.0.uri"]),
}


@pytest.mark.parametrize("case", START)
def test_a_run_cannot_start_from_a_checkpoint_of_another_kind(case, recipe, capsys):
    overrides, expected = START[case]
    config = load_run(str(recipe))
    run = recipe.parent / "runs" / "bad"
    publish(CheckpointStore(str(run), config.s3), 2)
    record_config(config)
    argv = ["--config", str(recipe)]
    for override in ("run.name=other", f"checkpoint.start_from={run}/checkpoints/step-00000002", *overrides):
        argv += ["--set", override.format(run=run)]
    assert main(argv) == 2
    told = capsys.readouterr().err
    for part in expected:
        assert part in told


def test_print_config_prints_and_trains_nothing(recipe, capsys):
    assert main(["--config", str(recipe), "--print-config", "--set", "train.lr=0.5"]) == 0
    assert "lr: 0.5" in capsys.readouterr().out
    assert not (recipe.parent / "runs").exists()
