"""A transformers causal language model from a plain config: random weights from a seed, or weights from a folder.

transformers is imported inside the functions: with torch loaded it takes 1.3 s of CPU, and the model's own module 2 s
more, by the Auto classes and by a direct import of the family alike (both load its generation code), so the Auto
classes it is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm.errors import ModelError
from llm.model.families import ISOLATES, TENSOR_PARALLEL

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.configuration_utils import PreTrainedConfig

# Said by our own arguments, or of no meaning to a model that is built here.
_OUR_ARGUMENTS = (
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "_attn_implementation",
    "use_cache",
    "architectures",
    "auto_map",
)
_SHOWN_NAMES = 4
CAUSAL_PROBE_TOKENS = 8


def build_model(
    config: dict[str, Any],
    *,
    seed: int,
    attention: str,
    pretrained: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A causal LM in training mode, in `dtype`, on the default device, that keeps no cache of keys and values.

    With `pretrained`, a local folder, its safetensors files are the weights, and they must be exactly the weights that
    `config` asks for. Otherwise weights are random: the same for the same `seed`, whatever was drawn before, and
    drawing them leaves the global random state as it was. Code that a folder may bring (`auto_map`) is never run.
    Raises ModelError for an unknown model_type, a config that the family refuses, an attention that it lacks, and
    weights that are missing, superfluous or of another shape.
    """
    from transformers import AutoModelForCausalLM

    settings = _transformers_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        try:
            if pretrained is None:
                model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention, dtype=dtype)
            else:
                model = _load(settings, pretrained, attention, dtype)
        except (ValueError, ImportError, AttributeError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(f"a {config['model_type']} model cannot be built: {_first_lines(error)}") from error
    if config["model_type"] not in ISOLATES | TENSOR_PARALLEL:  # of those, training was seen to be causal
        _require_causal(model, settings)
    return model.train()


@torch.no_grad()
def _require_causal(model: PreTrainedModel, settings: PreTrainedConfig) -> None:
    """Raises ModelError where a token's logits depend on the tokens after it, as in encoders: its loss would be a cheat."""
    ids = torch.arange(1, 1 + CAUSAL_PROBE_TOKENS)[None] % settings.vocab_size
    changed = ids.clone()
    changed[0, -2:] = (ids[0, -2:] + 1) % settings.vocab_size
    one, other = (model.eval()(input_ids=each).logits[0, :-2].float() for each in (ids, changed))
    # Of a causal model they are equal to the last bits; of an encoder with fresh weights they differ by a thousandth.
    if float((one - other).abs().max()) > 1e-5 * float(one.abs().max()):
        raise ModelError(
            f"a {settings.model_type} model sees the tokens after the one that it predicts, so it cannot be trained as a causal language "
            "model. If its family has the key, set is_decoder=true in its config.json; else use a decoder such as llama or gpt2"
        )


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Makes `model` keep only each layer's input for the backward pass and compute the rest again: the same numbers."""
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot recompute its activations. Nearest legal value: train.activation_checkpointing=false"
        )
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(how)
    else:  # its name before transformers 5.2x
        model.gradient_checkpointing_enable(how)


def _transformers_config(config: dict[str, Any]) -> PreTrainedConfig:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = config.get("model_type")
    if not isinstance(family, str) or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(str(family), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1, cutoff=0.0)
        raise ModelError(f"model_type={family!r} is no causal language model of transformers. Nearest legal name: {near[0]}")
    if config.get("quantization_config") is not None:
        raise ModelError("the config asks for quantized weights (quantization_config), which cannot be trained. Use the full weights")
    settings: dict[str, Any] = {name: value for name, value in config.items() if name not in (*_OUR_ARGUMENTS, "model_type")}
    settings["use_cache"] = False
    try:
        return CONFIG_MAPPING[family](**settings)
    except Exception as error:  # each family validates in its own way, with its own exception classes
        raise ModelError(f"a {family} model refuses its config: {_first_lines(error)}") from error


def _load(settings: PreTrainedConfig, folder: str, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"pretrained weights: {folder!r} is no local folder")
    if not any(path.glob("*.safetensors")):
        others = sorted(file.name for file in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        hint = f" ({_some(others)} could run code when read: convert to safetensors first)" if others else ""
        raise ModelError(f"{folder!r} holds no *.safetensors weights{hint}. Or set model.init=random")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=settings,
        attn_implementation=attention,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # they are refused below, with their shapes
        output_loading_info=True,
    )
    model, info = loaded
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing", sorted(info["missing_keys"])),
            ("of no use", sorted(info["unexpected_keys"])),
            (
                "of another shape",
                [f"{name} {tuple(has)} for {tuple(needs)}" for name, has, needs in sorted(info["mismatched_keys"])],
            ),
        )
        if names
    ]
    if problems:
        raise ModelError(
            f"the weights in {folder!r} do not fit the config. {'; '.join(problems)}. Remove the keys of model.config "
            "that change the model's shape, or set model.init=random"
        )
    return model


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")


def _first_lines(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    text = " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
    return re.sub(r'`?attn_implementation="eager"`?', "model.attention=eager", text)
