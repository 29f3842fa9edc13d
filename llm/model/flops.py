"""Parameters and training FLOPs of a model from its config alone, and the peak rate of well-known GPUs. Pure: no torch.

**Convention.** A multiply-add is 2 FLOPs. Only matrix products count: not norms, activations, softmax, rotary tables or
the loss. Attention counts as full S x S products, without halving for the causal mask (and without a discount for
sliding windows), as eager attention computes it and as torch's `FlopCounterMode` counts it. The backward pass costs
twice the forward pass. Activation checkpointing repeats the forward pass but adds no useful FLOPs, so model FLOPs
utilization (MFU: Chowdhery et al. 2022, PaLM, appendix B) does not count it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llm.model.families import field


@dataclass(frozen=True)
class _Sizes:
    """What the closed forms need, with the family's defaults filled in. Sizes are in elements."""

    hidden: int
    layers: int
    heads: int
    groups: int  # key-value heads
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    positions: int = 0  # rows of a learned position table; 0: rotary
    mlp_matrices: int = 3  # gate, up, down
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_bias: bool = False


# The defaults of transformers' config classes, for keys that a config.json leaves out.
_LLAMA_LIKE: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None, "head_dim": None},
    "mistral": {"vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8, "head_dim": None},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": None},
    "qwen3": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128},
}


def num_parameters(config: dict[str, Any]) -> int | None:
    """The number of trainable parameters, tied ones counted once: exact. None for a family without a closed form here.

    Families: llama, mistral, qwen2, qwen3, gpt2. Example: the preset llama_8b has 8,030,261,248.
    """
    s = _sizes(config)
    if s is None:
        return None
    norm = s.hidden * (2 if s.norm_bias else 1)
    layer = _layer_matrices(s) + 2 * norm
    layer += (s.heads + 2 * s.groups) * s.head_dim * s.qkv_bias + s.hidden * s.out_bias
    layer += ((s.mlp_matrices - 1) * s.intermediate + s.hidden) * s.mlp_bias + 2 * s.head_dim * s.qk_norm
    embeddings = (s.vocab * (1 if s.tied else 2) + s.positions) * s.hidden
    return embeddings + s.layers * layer + norm


def flops_per_token(config: dict[str, Any], seq_len: int) -> int | None:
    """FLOPs of forward and backward for a token of a row of `seq_len` tokens. None for a family without a closed form.

    Every weight of a matrix costs 2 FLOPs a token forward, and attention 2 x 2 x seq_len x (heads x head_dim) a layer
    (scores, then the sum of values); times 3 for the backward pass. See the module's docstring for what is left out.
    """
    s = _sizes(config)
    if s is None:
        return None
    attention = 2 * 2 * seq_len * s.heads * s.head_dim
    forward = s.layers * (2 * _layer_matrices(s) + attention) + 2 * s.hidden * s.vocab
    return 3 * forward


def _layer_matrices(s: _Sizes) -> int:
    """Elements of one layer's weight matrices: queries and output, keys and values, the feed-forward part."""
    return s.hidden * s.head_dim * (2 * s.heads + 2 * s.groups) + s.mlp_matrices * s.hidden * s.intermediate


def _sizes(config: dict[str, Any]) -> _Sizes | None:
    family = config.get("model_type")
    if family == "gpt2":
        return None if config.get("add_cross_attention") else _gpt2_sizes(config)
    if family not in _LLAMA_LIKE:
        return None
    default = _LLAMA_LIKE[family]
    hidden = field(config, "hidden_size", 4096)
    heads = field(config, "num_attention_heads", 32)
    groups = default["num_key_value_heads"] if "num_key_value_heads" not in config else config["num_key_value_heads"]
    bias = family in ("llama", "qwen3") and bool(config.get("attention_bias"))
    return _Sizes(
        hidden=hidden,
        layers=field(config, "num_hidden_layers", 32),
        heads=heads,
        groups=heads if groups is None else groups,
        head_dim=field(config, "head_dim", default["head_dim"] or hidden // heads),
        intermediate=field(config, "intermediate_size", default["intermediate_size"]),
        vocab=field(config, "vocab_size", default["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias")),
        qk_norm=family == "qwen3",
    )


def _gpt2_sizes(config: dict[str, Any]) -> _Sizes:
    hidden, heads = field(config, "hidden_size", 768), field(config, "num_attention_heads", 12)
    return _Sizes(
        hidden=hidden,
        layers=field(config, "num_hidden_layers", 12),
        heads=heads,
        groups=heads,
        head_dim=hidden // heads,
        intermediate=field(config, "intermediate_size", 4 * hidden),
        vocab=field(config, "vocab_size", 50257),
        tied=bool(config.get("tie_word_embeddings", True)),
        positions=field(config, "max_position_embeddings", 1024),
        mlp_matrices=2,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norm_bias=True,
    )


# (pattern of the device's name, bf16, fp16, fp32) in TFLOP/s; None: the chip has no such unit. First match wins.
_PEAK_TFLOPS: list[tuple[str, float | None, float | None, float]] = [
    (r"\bGB200\b", 2500, 2500, 80),
    (r"\bB200\b", 2250, 2250, 75),
    (r"\bH200 NVL\b", 835.5, 835.5, 60),
    (r"\b(H200|GH200)\b", 989.5, 989.5, 67),
    (r"\bH100 PCIe\b", 756.5, 756.5, 51),
    (r"\bH100 NVL\b", 835.5, 835.5, 60),
    (r"\bH100\b", 989.5, 989.5, 67),
    (r"\b(A100|A800)\b", 312, 312, 19.5),
    (r"\bA30\b", 165, 165, 10.3),
    (r"\bA40\b", 149.7, 149.7, 37.4),
    (r"\bA10G\b", 70, 70, 35),
    (r"\bA10\b", 125, 125, 31.2),
    (r"\bL40S\b", 362, 362, 91.6),
    (r"\bL40\b", 181, 181, 90.5),
    (r"\bL4\b", 121, 121, 30.3),
    (r"\bV100S", None, 130, 16.4),
    (r"\bV100-PCIE", None, 112, 14),
    (r"\bV100", None, 125, 15.7),
    (r"\bT4\b", None, 65, 8.1),
    (r"\bRTX 5090\b", 209.5, 209.5, 104.8),
    (r"\bRTX 4090\b", 165.2, 165.2, 82.6),
    (r"\bRTX 3090\b(?! Ti)", 71, 71, 35.6),
    (r"\bRTX 6000 Ada\b", 364.2, 364.2, 91.1),
    (r"\bRTX A6000\b", 154.8, 154.8, 38.7),
    (r"\b(MI300X|MI325X)\b", 1307.4, 1307.4, 163.4),
]
_SLOWER_VARIANT = re.compile(r"\bMIG\b|\bLaptop\b|\bMax-Q\b|\b[45]090 D", re.IGNORECASE)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak FLOP/s of a GPU as torch names it, at "bf16", "fp16" or "fp32"; None where it is not known.

    None means a CPU, an unknown device, or a chip without units of that precision. Sources: NVIDIA's data sheets of
    each product (B200: HGX B200, an eighth of the board; V100, T4, A100, H100, H200, L4, L40S, A10, A10G, ...), the
    GA102, Ada and Blackwell architecture whitepapers for GeForce and RTX (with fp32 accumulation) and AMD's data sheets
    of MI300X and MI325X. Figures given "with sparsity" are halved. fp32 is the rate without TF32, which torch keeps off
    by default. A part of a GPU (MIG) and laptop variants under a desktop name give None: their rate is not the data
    sheet's.
    """
    if _SLOWER_VARIANT.search(device_name):
        return None
    for pattern, bf16, fp16, fp32 in _PEAK_TFLOPS:
        if re.search(pattern, device_name, re.IGNORECASE):
            tera = {"bf16": bf16, "fp16": fp16, "fp32": fp32}[precision]
            return None if tera is None else tera * 1e12
    return None
