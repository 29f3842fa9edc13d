"""One run, many layouts: the loss of every step is the same, whatever ZeRO stage, tensor size, data size or accumulation."""

from __future__ import annotations

import functools

import pytest

from llm.errors import ModelError
from tests.distributed.layouts import llama, make_config, run_layout, run_ranks, train_rank
from tests.distributed.lora import on_lora

# fp32 sums in another order; 20 steps of AdamW amplify the last bits.
TOLERANCE = 1e-4

MODELS = {
    "llama_untied": llama(),
    "llama_tied": llama(tie_word_embeddings=True),
    "qwen2_tied": llama(model_type="qwen2", tie_word_embeddings=True),
    "qwen3_untied": llama(model_type="qwen3", head_dim=16),
}
LAYOUTS = {  # workers, tensor, zero stage
    "zero0_dp2": (2, 1, 0),
    "zero1_dp2": (2, 1, 1),
    "zero2_dp2": (2, 1, 2),
    "zero3_dp2": (2, 1, 3),
    "tp2": (2, 2, 1),
    "zero0_tp2": (2, 2, 0),
    "zero1_tp2_dp2": (4, 2, 1),
}
EVERY_MODEL = ("zero3_dp2", "zero1_tp2_dp2")
CASES = [(model, layout) for model in MODELS for layout in LAYOUTS if model == "llama_untied" or layout in EVERY_MODEL]


@functools.cache
def one_process(model: str):
    config = make_config(train={"microbatch_rows": 2})
    return run_layout(config, MODELS[model])


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_losses_equal_one_process(model, layout):
    workers, tensor, stage = LAYOUTS[layout]
    config = make_config(parallel={"workers": workers, "tensor": tensor, "zero_stage": stage}, train={"microbatch_rows": 2})
    result, reference = run_layout(config, MODELS[model]), one_process(model)
    assert len(result.losses) == 20
    assert result.losses == pytest.approx(reference.losses, abs=TOLERANCE)
    assert result.grad_norms == pytest.approx(reference.grad_norms, rel=1e-3)
    assert result.extra == reference.extra  # tokens counted, the cursor and the ledger after the last batch
    assert reference.losses[-1] < reference.losses[0] - 0.1  # it learned: equal losses are not equal noise


@pytest.mark.parametrize(("microbatch_rows", "microbatches"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_accumulation_does_not_change_the_loss(microbatch_rows, microbatches):
    config = make_config(train={"microbatch_rows": microbatch_rows})
    assert config.rank_rows // config.microbatch_rows == microbatches
    assert run_layout(config, MODELS["llama_untied"]).losses == pytest.approx(one_process("llama_untied").losses, abs=TOLERANCE)


@pytest.mark.parametrize(("optimizer", "parallel"), [
    ("sgd", {"workers": 2, "zero_stage": 2}),
    ("adamw", {"workers": 2, "zero_stage": 2, "offload": "optimizer"}),
    ("adamw", {"workers": 2, "zero_stage": 3, "offload": "all"}),
])  # fmt: skip
def test_offload_and_other_optimizers_equal_one_process(optimizer, parallel):
    train = {"microbatch_rows": 2, "optimizer": optimizer, "steps": 6}
    alone = run_layout(make_config(train=train), MODELS["llama_untied"])
    result = run_layout(make_config(train=train, parallel=parallel), MODELS["llama_untied"])
    assert result.losses == pytest.approx(alone.losses, abs=TOLERANCE)


@pytest.mark.parametrize("parallel", [{"workers": 2, "zero_stage": 3}, {"workers": 2, "tensor": 2}], ids=["zero3", "tp2"])
def test_activation_checkpointing_changes_no_loss(parallel):
    train = {"microbatch_rows": 2, "activation_checkpointing": True}
    result = run_layout(make_config(train=train, parallel=parallel), MODELS["llama_untied"])
    assert result.losses == pytest.approx(one_process("llama_untied").losses, abs=TOLERANCE)


def test_isolated_documents_have_the_same_loss_on_every_layout():
    data = {"isolate_documents": True}
    train = {"microbatch_rows": 2, "steps": 6}
    alone = run_layout(make_config(data=data, train=train), MODELS["llama_untied"])
    split = run_layout(make_config(data=data, train=train, parallel={"workers": 4, "tensor": 2}), MODELS["llama_untied"])
    assert split.losses == pytest.approx(alone.losses, abs=TOLERANCE)


GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def test_gpt2_trains_at_tensor_size_1_and_is_refused_by_name_at_2():
    config = make_config(train={"microbatch_rows": 2, "steps": 6})
    assert len(run_layout(config, GPT2).losses) == 6
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel cannot be split over parallel\.tensor=2"):
        run_layout(make_config(parallel={"workers": 2, "tensor": 2}), GPT2)


def test_adapters_are_refused_by_name_at_tensor_size_2():
    """DeepSpeed would put split matrices in the place of peft's layers, and train none of the adapters."""
    config = make_config(parallel={"workers": 2, "tensor": 2}, train={"microbatch_rows": 2, "steps": 2})
    with pytest.raises(ModelError, match=r"drop the adapters of 8 of its layers, such as base_model\.model\.model\.layers\.0\.self_attn"):
        run_ranks(functools.partial(on_lora, train_rank, 0.0), 2, config, MODELS["llama_untied"], 0)
