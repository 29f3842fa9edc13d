"""What is known of model families, and of no single model: the names of their sizes, and what they are able to do.

In a file of its own because presets, checks and closed forms all read it. Pure: no torch, no transformers. "Family" is
the `model_type` of a Hugging Face config.
"""

from __future__ import annotations

from typing import Any

# The first name is the one that this project uses; the others are what some families call the same thing.
ALIASES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size", "n_vocab"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    "tie_word_embeddings": ("tie_word_embeddings",),
}

# Five training steps under DeepSpeed 0.19.8 AutoTP gave the losses of one process (fp32, clipped gradients,
# vocabulary-parallel head off): llama, mistral, qwen2 and qwen3 at ZeRO 0 to 3, the others at ZeRO 1 and 3. A family
# that is not here may split without an error and still train something else.
TENSOR_PARALLEL = frozenset(
    {
        "arcee",
        "cohere",
        "exaone4",
        "gemma",
        "gemma3_text",
        "gpt_neox",
        "granite",
        "helium",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "opt",
        "phi",
        "qwen2",
        "qwen3",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
_CONV1D = "DeepSpeed's AutoTP does not split its Conv1D layers, which hold queries, keys and values in one matrix"
_PLAN = "DeepSpeed's AutoTP rejects its partition plan (style rowwise_split_input)"
_EXPERTS = "DeepSpeed's AutoTP rejects the partition plan of its experts"
WHY_NOT_SPLIT = {
    "gpt2": _CONV1D,
    "openai-gpt": _CONV1D,
    "olmo2": _PLAN,
    "olmo3": _PLAN,
    "phi3": _PLAN,
    "glm": _PLAN,
    "glm4": _PLAN,
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "falcon": "DeepSpeed's AutoTP cuts its fused query-key-value matrix into the wrong shapes",
}

# Position ids that restart keep documents apart: each gives the logits that it gives alone (to 1e-5 in fp32, in eager
# and sdpa attention). Known not to: opt and biogpt (positions counted anew from the mask), bloom and mpt (alibi).
ISOLATES = frozenset(
    {
        "apertus",
        "arcee",
        "codegen",
        "cohere",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "granite",
        "helium",
        "llama",
        "ministral3",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)

HIDDEN_IS_HEADS = frozenset({"llama", "gpt2"})  # hidden_size % heads == 0 is demanded even with a head_dim

# What a config.json may name beside the keys that it happens to hold.
COMMON_KEYS = frozenset(
    {
        *(first for first, *_ in ALIASES.values()),
        "hidden_act",
        "initializer_range",
        "rms_norm_eps",
        "rope_parameters",
        "attention_bias",
        "mlp_bias",
        "attention_dropout",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
)
FAMILY_KEYS: dict[str, frozenset[str]] = {
    "gpt2": frozenset(
        {
            "vocab_size",
            "n_positions",
            "n_embd",
            "n_layer",
            "n_head",
            "n_inner",
            "activation_function",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "layer_norm_epsilon",
            "initializer_range",
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "reorder_and_upcast_attn",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        }
    ),
}
SET_ELSEWHERE = {
    "model_type": "choose another model.preset or model.path",
    "attn_implementation": "set model.attention",
    "_attn_implementation": "set model.attention",
    "dtype": "set train.precision",
    "torch_dtype": "set train.precision",
    "use_cache": "training never keeps a cache of keys and values",
    "quantization_config": "training needs unquantized weights",
}


def field(config: dict[str, Any], name: str, default: Any = None) -> Any:
    """The value of `name`, a key of ALIASES, under the name that `config` uses for it; `default` if absent or null."""
    for alias in ALIASES[name]:
        if config.get(alias) is not None:
            return config[alias]
    return default
