"""`headrace export` from the checkpoint of a run on several ranks: what transformers loads are the very weights."""

from __future__ import annotations

from pathlib import Path

import torch

from jobs.export import main
from llm.checkpoint.read import read_full_weights
from llm.checkpoint.store import CheckpointStore
from llm.config import RunConfig, S3Section
from llm.config_file import dump_run
from llm.model.presets import model_config
from llm.tokenizer import save_tokenizer, train_tokenizer
from tests.distributed.checkpoint_runs import layout_config, train_run
from tests.distributed.layouts import run_ranks

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_any_checkpoint_of_a_run_is_exported(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter([f"sentence {i} of {i * 7}" for i in range(500)]), "bpe", 300)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    sections = layout_config((3, 1, 2), 4, {"every_steps": 2}, warmup_steps=0).model_dump()
    sections["model"] = {"preset": "llama_1m", "config": SMALL}
    sections["tokenizer"] = {"path": str(tmp_path / "tokenizer")}
    config = RunConfig.model_validate(sections)
    model = model_config(config.model, tokenizer.vocab_size, lambda uri: b"")
    run = tmp_path / "run"
    run_ranks(train_run, 2, config, str(run), model)
    (run / "config.yaml").write_text(dump_run(config))
    store = CheckpointStore(str(run), S3Section())
    assert store.steps() == [4, 2]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    for step, given in ((4, []), (2, ["--step", "2"])):
        to = tmp_path / f"export-{step}"
        assert main(["--run", str(run), "--to", str(to), *given]) == 0
        loaded = AutoModelForCausalLM.from_pretrained(to, local_files_only=True, dtype=torch.float32).state_dict()
        saved = dict(read_full_weights(store.open(step)))
        assert loaded.keys() - saved.keys() == {"lm_head.weight"}, "tied to the embedding"
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
        assert len(AutoTokenizer.from_pretrained(to, local_files_only=True)) == tokenizer.vocab_size
    damaged = run / "checkpoints" / "step-00000004" / "rank-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["--run", str(run), "--to", str(tmp_path / "older")]) == 0
    older = AutoModelForCausalLM.from_pretrained(tmp_path / "older", local_files_only=True, dtype=torch.float32).state_dict()
    assert all(torch.equal(saved[name], older[name]) for name in saved), "the newest good one is that of step 2"
    assert main(["--run", str(run), "--to", str(tmp_path / "no"), "--step", "4"]) == 2 and not (tmp_path / "no").exists()
