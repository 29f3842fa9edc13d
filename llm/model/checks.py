"""The rules between a model, the tokenizer, the rows and the tensor group: every one that is broken, before anything is built."""

from __future__ import annotations

from typing import Any

from llm.model.families import ALIASES, HIDDEN_IS_HEADS, ISOLATES, TENSOR_PARALLEL, WHY_NOT_SPLIT, field
from llm.model.mup import mup_problems


def check_model(
    config: dict[str, Any],
    *,
    tensor: int,
    vocab_size: int,
    seq_len: int,
    isolate: bool = False,
    attention: str = "sdpa",
    mup_base_width: int | None = None,
) -> list[tuple[str, str]]:
    """Every broken rule between the model, the tokenizer, the rows and the tensor group: (key to change, message).

    `vocab_size` is the tokenizer's number of ids, `seq_len` the tokens a row that the model predicts, `tensor` the size
    of a tensor group, `isolate` whether documents of a row are kept apart, `mup_base_width` the width to scale from.
    Sizes that `config` leaves to its family's defaults are not checked. An odd vocabulary needs no check: DeepSpeed
    splits the output matrix unevenly and right.
    """
    found = _number_problems(config)
    if found:
        return found
    rows = field(config, "vocab_size")
    if rows is not None and vocab_size > rows:
        near = -(-vocab_size // 64) * 64
        found.append(
            (
                "model.config.vocab_size",
                f"the tokenizer has {vocab_size} ids, the model's vocabulary {rows}: it must hold every id. Nearest "
                f"legal value: {vocab_size} ({near} divides by 64). Or use a tokenizer with at most {rows} ids",
            )
        )
    positions = field(config, "max_position_embeddings")
    if positions is not None and seq_len > positions:
        found.append(
            (
                "data.seq_len",
                f"data.seq_len={seq_len} is longer than the model's {positions} positions. Nearest legal value: "
                f"{positions}. Or set model.config.max_position_embeddings={seq_len}",
            )
        )
    found += _shape_problems(config)
    if isolate:
        found += _isolation_problems(config["model_type"], attention)
    if mup_base_width is not None:
        found += mup_problems(config, mup_base_width)
    if tensor > 1:
        found += _tensor_problems(config, tensor)
    return found


def _number_problems(config: dict[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name in ALIASES:
        value = field(config, name)
        if value is None or name == "tie_word_embeddings" or (type(value) is int and value >= 1):
            continue
        if name == "num_key_value_heads" and isinstance(value, list):  # families whose layers differ
            continue
        near = max(1, round(value)) if isinstance(value, int | float) and abs(value) < 1e12 else 1
        found.append((f"model.config.{name}", f"{name}={value!r} must be a whole number of at least 1. Nearest legal value: {near}"))
    return found


def _isolation_problems(family: str, attention: str) -> list[tuple[str, str]]:
    if family not in ISOLATES:
        rule = f"a {family} model does not keep documents apart by their positions"
        hint = f". Families that do: {', '.join(sorted(ISOLATES))}"
    elif attention not in ("eager", "sdpa"):
        rule = f"model.attention={attention} keeps documents apart only in microbatches of one row"
        hint = ". Or set model.attention=sdpa"
    else:
        return []
    return [("data.isolate_documents", f"{rule}. Nearest legal value: data.isolate_documents=false{hint}")]


def _shape_problems(config: dict[str, Any]) -> list[tuple[str, str]]:
    hidden, heads = field(config, "hidden_size"), field(config, "num_attention_heads")
    groups, head_dim = field(config, "num_key_value_heads"), field(config, "head_dim")
    found: list[tuple[str, str]] = []
    if hidden and heads and hidden % heads and (head_dim is None or config["model_type"] in HIDDEN_IS_HEADS):
        found.append(
            (
                "model.config.hidden_size",
                f"hidden_size={hidden} cannot be split over num_attention_heads={heads}. Nearest legal values: {_multiples(hidden, heads)}",
            )
        )
    if heads and isinstance(groups, int) and heads % groups:
        found.append(
            (
                "model.config.num_key_value_heads",
                f"num_attention_heads={heads} cannot share num_key_value_heads={groups}. Nearest legal values: {_divisors(heads, groups)}",
            )
        )
    return found


def _tensor_problems(config: dict[str, Any], tensor: int) -> list[tuple[str, str]]:
    family = config["model_type"]
    if family not in TENSOR_PARALLEL:
        why = WHY_NOT_SPLIT.get(family, "its training in a tensor group was not found equal to training alone")
        return [
            (
                "parallel.tensor",
                f"a {family} model cannot be split into tensor groups of {tensor}: {why}. Nearest legal value: 1. "
                f"Families that can be split: {', '.join(sorted(TENSOR_PARALLEL))}",
            )
        ]
    sizes = {
        "num_attention_heads": field(config, "num_attention_heads"),
        "num_key_value_heads": field(config, "num_key_value_heads"),
        "intermediate_size": field(config, "intermediate_size"),
    }
    found: list[tuple[str, str]] = []
    for name, size in sizes.items():
        if isinstance(size, int) and size % tensor:
            found.append(
                (
                    "parallel.tensor",
                    f"parallel.tensor={tensor} must divide {name}={size}. Nearest legal values: "
                    f"{_divisors(size, tensor)}. Or set model.config.{name} to one of {_multiples(size, tensor)}",
                )
            )
    return found


def _divisors(total: int, near: int) -> str:
    """The divisors of `total` on both sides of `near`, as text."""
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    around = [n for n in divisors if n <= near][-1:] + [n for n in divisors if n > near][:1]
    return ", ".join(map(str, around))


def _multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return ", ".join(str(n) for n in (below, below + unit) if n > 0)
