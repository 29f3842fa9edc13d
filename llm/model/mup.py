"""A model whose best learning rate does not move with its width: maximal update parametrization (muP), by config alone.

Source: Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer" (2022), table 3, the column of
Adam. With r = hidden_size / model.mup_base_width, against what the family draws and `train.lr` says:

| | initial values x | learning rate x |
|---|---|---|
| embedding | 1 | 1 |
| matrices between embedding and head | 1 / sqrt(r) | 1 / r |
| head | 1 / r | 1 / r |
| norms, biases | 1 | 1 |

So at the base width nothing changes. Table 8 of the paper says the same with a multiplier at the head's output in place of the head's
factors, which would let it share its weights with the embedding. Table 3 needs no multiplier, so the exported model is a plain one of its
family; tied embeddings are refused. AdamW's decay is multiplied by r where the learning rate is divided by it: what is taken off a weight
in a step, lr x weight_decay, is the same at every width.

Attention divides by sqrt(head_dim). The paper divides by head_dim instead, for heads that grow with the width. Here the number of heads
grows and head_dim stays, so the difference is a constant, and nothing is changed. A width must shrink to the base as a whole: the numbers
of heads and intermediate_size in proportion to hidden_size, which the config of one width can only show in part.
"""

from __future__ import annotations

from math import gcd, lcm
from typing import Any, Literal

from llm.errors import ModelError
from llm.model.families import field

# Plain transformers, whose embedding, attention and head have no factor of their own that follows the width.
MUP_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
IN_PROPORTION = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

Kind = Literal["embedding", "hidden", "head"]


def mup_problems(config: dict[str, Any], base_width: int) -> list[tuple[str, str]]:
    """Every rule that `config`, of a model that is to have `base_width` as its base, breaks: (key to change, message)."""
    family, width = config["model_type"], field(config, "hidden_size")
    if family not in MUP_FAMILIES:
        rule = f"model.mup_base_width is for the families {', '.join(MUP_FAMILIES)}, not {family}. Nearest legal value: null"
        return [("model.mup_base_width", rule)]
    if width is None:
        return [("model.config.hidden_size", "model.mup_base_width needs model.config.hidden_size to be given")]
    found: list[tuple[str, str]] = []
    if field(config, "tie_word_embeddings"):
        rule = "model.mup_base_width scales embedding and head in different ways, so they cannot share weights"
        found.append(("model.config.tie_word_embeddings", f"{rule}. Set model.config.tie_word_embeddings=false"))
    sizes = {name: size for name in IN_PROPORTION if (size := field(config, name)) is not None}
    broken = [f"{name}={size}" for name, size in sizes.items() if size * base_width % width]
    if broken:
        unit = lcm(*(width // gcd(width, size) for size in sizes.values()))
        below = base_width // unit * unit
        near = ", ".join(str(n) for n in (below, below + unit) if n)
        rule = f"model.mup_base_width={base_width}: {', '.join(broken)} of a model of width {width} would be no whole number at that width"
        found.append(("model.mup_base_width", f"{rule}. Nearest legal values: {near}"))
    return found


def width_ratio(model: Any, base_width: int) -> float:
    return model.config.hidden_size / base_width


def kinds_of_matrices(model: Any) -> dict[str, Kind]:
    """What each of the model's matrices is, by parameter name. Raises ModelError where embedding and head are one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        raise ModelError(
            f"model.mup_base_width needs a head of its own, and this {type(model).__name__} shares the embedding's weights. "
            "Set model.config.tie_word_embeddings=false"
        )
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    return {
        name: "embedding" if parameter is embedding.weight else "head" if parameter is head.weight else "hidden"
        for name, parameter in matrices.items()
    }


def scale_initial_weights(model: Any, base_width: int) -> None:
    """Multiplies the weights that the family drew by the factors in the module's docstring, in place."""
    ratio = width_ratio(model, base_width)
    factors: dict[Kind, float] = {"embedding": 1.0, "hidden": ratio**-0.5, "head": 1 / ratio}
    for name, kind in kinds_of_matrices(model).items():
        model.get_parameter(name).data.mul_(factors[kind])
