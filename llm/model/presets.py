"""Which model a run builds: presets, a folder's config.json, overrides. What must hold between them is in `llm/model/checks.py`.

Everything works on the plain dict of a Hugging Face config.json, so a plan can be made without importing torch or
transformers. Families name the same size differently (`n_embd`, `hidden_size`): `field` reads any of them, and
overrides may use either name.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Iterable
from typing import Any

from llm.config import ModelSection
from llm.errors import ModelError, StorageError
from llm.model.families import (
    ALIASES,
    COMMON_KEYS,
    FAMILY_KEYS,
    SET_ELSEWHERE,
)


def _llama(**sizes: Any) -> dict[str, Any]:
    base = {
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
    }
    return base | _NO_SPECIAL_TOKENS | sizes


# Which ids are special is the tokenizer's to say: a preset's own would be wrong for every other vocabulary.
_NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _llama3_rope(factor: float) -> dict[str, Any]:
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {"rope_type": "llama3", "rope_theta": 500000.0, **scaling}


PRESETS: dict[str, dict[str, Any]] = {
    # 1.25M parameters: four layers that train in seconds on a CPU.
    "llama_1m": _llama(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # 9.97M parameters
    "llama_10m": _llama(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # GPT-2 small (Radford et al. 2019), 124.4M parameters. Its dropout of 0.1 is off: one pass over the data does not
    # overfit, and a run can only be repeated bit for bit on another layout when no rank draws random numbers in the
    # forward pass.
    "gpt2_124m": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        **_NO_SPECIAL_TOKENS,
    },
    # Llama 3.2 1B: 1.236B parameters
    "llama_1b": _llama(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope_parameters=_llama3_rope(32.0),
    ),
    # Llama 3.1 8B: 8.030B parameters
    "llama_8b": _llama(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        rope_parameters=_llama3_rope(8.0),
    ),
    # Qwen3 0.6B: 596M parameters
    "qwen3_600m": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        **_NO_SPECIAL_TOKENS,
    },
}


def model_config(section: ModelSection, vocab_size: int | None, read_json: Callable[[str], bytes]) -> dict[str, Any]:
    """The config of the model that will be built: a new dict in the keys of its family, `section.config` laid over it.

    `vocab_size`, when given, is the number of rows of the embedding of a model with random weights; an explicit
    `section.config["vocab_size"]` wins, and pretrained weights keep theirs. `read_json` gets `<path>/config.json` and
    returns its bytes (it may do any I/O; OSError means that there is no such file). Raises ModelError for an unknown
    preset or key, a key that another section owns, and a config.json that is missing or damaged.
    """
    config = copy.deepcopy(_preset(section.preset)) if section.preset is not None else _from_folder(section, read_json)
    overrides: dict[str, Any] = {}
    for name, value in section.config.items():
        own_name = _own_name(config, name)
        if own_name in overrides:
            raise ModelError(f"model.config names {own_name} twice, the second time as {name!r}. Keep one of them")
        overrides[own_name] = value
    if vocab_size is not None and section.init == "random":
        config[_own_name(config, "vocab_size")] = vocab_size
    return config | copy.deepcopy(overrides)


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise ModelError(f"model.preset={name!r} is unknown. {_nearest(name, PRESETS)}. Presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def _from_folder(section: ModelSection, read_json: Callable[[str], bytes]) -> dict[str, Any]:
    if section.path is None:
        raise ModelError("give exactly one of model.preset and model.path")
    file = f"{section.path.rstrip('/')}/config.json"
    try:
        content = read_json(file)
    except (OSError, StorageError) as error:
        raise ModelError(
            f"model.path={section.path!r} has no readable config.json ({error}). Name a folder written by "
            f"save_pretrained, or use model.preset, one of {', '.join(PRESETS)}"
        ) from error
    try:
        config = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f'{file} does not say which model it is: a JSON object with a "model_type" is needed')
    return config


def _own_name(config: dict[str, Any], name: str) -> str:
    """The key under which `config`'s family keeps `name`; raises ModelError if it has no such key."""
    if name in SET_ELSEWHERE:
        raise ModelError(f"model.config.{name} cannot be set here: {SET_ELSEWHERE[name]}")
    known = FAMILY_KEYS.get(config["model_type"], COMMON_KEYS) | config.keys()
    for aliases in ALIASES.values():
        if name in aliases:
            used = [alias for alias in aliases if alias in config] or [alias for alias in aliases if alias in known]
            # `n_embd` is no key of a llama: only the project's own names are translated.
            if used and name in (used[0], aliases[0]):
                return used[0]
    if name in known:
        return name
    legal = known - SET_ELSEWHERE.keys()
    raise ModelError(f"model.config.{name} is no key of a {config['model_type']} model. {_nearest(name, legal)}")


def _nearest(name: str, legal: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(legal), n=1, cutoff=0.0)
    return f"Nearest legal name: {close[0]}"
