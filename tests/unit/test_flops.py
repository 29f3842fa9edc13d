"""Closed forms of parameters and FLOPs against what is counted on the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llm.model.build import build_model
from llm.model.flops import _LLAMA_LIKE, _gpt2_sizes, _sizes, flops_per_token, num_parameters, peak_flops
from llm.model.presets import PRESETS

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "llama tied": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
    "llama biases": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
    "llama head_dim": {"model_type": "llama", **SMALL, "head_dim": 20},
    "llama all heads": {"model_type": "llama", **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}},
    "llama null groups": {"model_type": "llama", **SMALL, "num_key_value_heads": None, "head_dim": None},
    "mistral": {"model_type": "mistral", **SMALL},
    "mistral window": {"model_type": "mistral", **SMALL, "sliding_window": 8, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **SMALL},
    "qwen2 tied": {"model_type": "qwen2", **SMALL, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 24},
    "qwen3 bias tied": {"model_type": "qwen3", **SMALL, "attention_bias": True, "tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt2 inner": {**GPT2, "n_inner": 100},
    "gpt2 untied": {**GPT2, "tie_word_embeddings": False},
}
EXACT = {"gpt2_124m": 124_439_808, "llama_1b": 1_235_814_400, "llama_8b": 8_030_261_248, "qwen3_600m": 596_049_920}


def built(config: dict[str, Any], device: str):
    with torch.device(device):
        return build_model(config, seed=0, attention="eager")


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_equal_those_of_the_model(name: str) -> None:
    counted = sum(parameter.numel() for parameter in built(VARIANTS[name], "meta").parameters())
    assert num_parameters(VARIANTS[name]) == counted


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets_equal_those_of_the_model(name: str) -> None:
    counted = sum(parameter.numel() for parameter in built(PRESETS[name], "meta").parameters())
    assert num_parameters(PRESETS[name]) == counted == EXACT.get(name, counted)


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_equal_those_counted_over_forward_and_backward(name: str) -> None:
    config, rows, seq = VARIANTS[name], 2, 12
    model = built(config, "cpu")
    ids = torch.randint(0, 97, (rows, seq), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    expected = flops_per_token(config, seq)
    assert expected is not None
    assert counter.get_total_flops() == rows * seq * expected


def test_flops_grow_with_the_row_by_attention_alone() -> None:
    config = PRESETS["llama_8b"]
    at_1k, at_2k, at_3k = (flops_per_token(config, seq) for seq in (1024, 2048, 3072))
    assert at_1k and at_2k and at_3k
    assert at_2k - at_1k == at_3k - at_2k == 12 * 32 * 4096 * 1024
    # 6 FLOPs a parameter, without the embedding, which is looked up and not multiplied; norms are 0.003% of the rest.
    multiplied = (num_parameters(config) or 0) - 128256 * 4096
    assert at_1k - 12 * 32 * 4096 * 1024 == pytest.approx(6 * multiplied, rel=1e-4)


@pytest.mark.parametrize("config", [{"model_type": "mamba"}, {"model_type": "mixtral"}, {}])
def test_other_families_have_no_closed_form(config: dict[str, Any]) -> None:
    assert num_parameters(config) is None
    assert flops_per_token(config, 8) is None


def test_cross_attention_has_no_closed_form() -> None:
    assert num_parameters({**GPT2, "add_cross_attention": True}) is None


@pytest.mark.parametrize("family", [*_LLAMA_LIKE, "gpt2"])
def test_keys_left_out_have_the_defaults_of_transformers(family: str) -> None:
    config = CONFIG_MAPPING[family]()
    spelled_out = _sizes({"model_type": family, **config.to_dict()})
    assert _sizes({"model_type": family}) == spelled_out
    assert family != "gpt2" or spelled_out == _gpt2_sizes({})


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5e12),
        ("NVIDIA H100 PCIe", "fp16", 756.5e12),
        ("NVIDIA H100 NVL", "bf16", 835.5e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("NVIDIA GH200 480GB", "bf16", 989.5e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L40", "bf16", 181e12),
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("Tesla T4", "fp16", 65e12),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-PCIE-32GB", "fp16", 112e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("cpu", "fp32", None),
        ("Intel(R) Xeon(R) Platinum 8481C CPU", "bf16", None),
        ("NVIDIA RTX 4000 Ada Generation", "bf16", None),
    ],
)
def test_peak_rates_are_found_by_the_names_that_torch_gives(name: str, precision: str, peak: float | None) -> None:
    assert peak_flops(name, precision) == peak
