"""muP: nothing grows with the width that should not, so the learning rate that was best for a narrow model is best for a wide one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.config import ModelSection
from llm.config_file import parse_run
from llm.config_train import TrainSection
from llm.errors import ConfigError, ModelError
from llm.model.build import build_model
from llm.model.checks import check_model
from llm.model.mup import kinds_of_matrices, scale_initial_weights
from llm.model.presets import model_config
from llm.train.optimizer import param_groups
from tests.distributed.layouts import llama, unequal_rows

BASE, HEAD_DIM, SEQ_LEN = 32, 8, 16
WIDTHS = (BASE, 2 * BASE, 4 * BASE, 8 * BASE)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Such small matrices are not worth a second thread, which on a busy machine costs many times more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(width: int) -> dict[str, Any]:
    heads = width // HEAD_DIM
    return llama(hidden_size=width, intermediate_size=2 * width, num_attention_heads=heads, num_key_value_heads=heads // 2)


def model_of(width: int, base: int | None) -> Any:
    model = build_model(config_of(width), seed=0, attention="eager")
    if base is not None:
        scale_initial_weights(model, base)
    return model


def trained(model: Any, base: int | None, lr: float, batches: Tensor) -> list[float]:
    """Trains with AdamW on each of the batches; the loss of each before its update."""
    train = TrainSection(steps=1, batch_rows=1, lr=lr)
    optimizer = torch.optim.AdamW(param_groups(model, train, base), betas=train.betas, eps=train.eps)
    losses = []
    for ids in batches:
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def rows(num_batches: int) -> Tensor:
    ids, _ = unequal_rows(16 * num_batches, SEQ_LEN)
    return torch.from_numpy(ids).long().view(num_batches, 16, SEQ_LEN + 1)


def outputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What the embedding, each layer and the head give."""
    found: dict[str, Tensor] = {}
    parts = {
        "embedding": model.model.embed_tokens,
        **{f"layer {i}": layer for i, layer in enumerate(model.model.layers)},
        "head": model.lm_head,
    }
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: found.update({name: out[0] if isinstance(out, tuple) else out}))
        for name, part in parts.items()
    ]
    with torch.no_grad():
        model(input_ids=ids[:, :-1])
    for hook in hooks:
        hook.remove()
    return found


@cache
def moved(width: int, base: int | None) -> dict[str, float]:
    """The mean absolute change of each part's output in four steps of Adam."""
    model, batch = model_of(width, base), rows(1)
    before = outputs(model, batch[0])
    trained(model, base, 1e-2, batch.expand(4, -1, -1))
    return {name: float((after - before[name]).abs().mean()) for name, after in outputs(model, batch[0]).items()}


def test_coordinate_check():
    """With muP a step moves every layer's output by as much at 8 times the width; without, by several times as much."""
    parts = list(moved(BASE, BASE))
    assert parts == ["embedding", "layer 0", "layer 1", "head"]
    for name in parts:
        sizes = [moved(width, BASE)[name] for width in WIDTHS]
        assert max(sizes) / min(sizes) < 1.6, (name, sizes)
    for name in parts[1:]:
        sizes = [moved(width, None)[name] for width in WIDTHS]
        assert sizes == sorted(sizes) and sizes[-1] / sizes[0] > 5, (name, sizes)


@pytest.mark.parametrize(("base", "best_when_wide"), [(BASE, 2.0**-7), (None, 2.0**-9)])
def test_the_best_rate_of_a_narrow_model_is_the_best_of_one_4_times_as_wide_and_is_not_without_it(base, best_when_wide):
    grid, batches = [2.0**-9, 2.0**-7, 2.0**-5], rows(60)
    for width, expected in ((BASE, 2.0**-7), (4 * BASE, best_when_wide)):
        ends = [sum(trained(model_of(width, base), base, lr, batches)[-10:]) / 10 for lr in grid]
        assert grid[ends.index(min(ends))] == expected, (width, ends)


def test_at_the_base_width_nothing_changes():
    scaled, plain = model_of(BASE, BASE), model_of(BASE, None)
    assert all(torch.equal(a, b) for a, b in zip(scaled.parameters(), plain.parameters(), strict=True))
    groups = param_groups(scaled, TrainSection(steps=1, batch_rows=1, lr=0.5), BASE)
    assert {group["peak_lr"] for group in groups} == {0.5}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_factors_are_those_of_the_paper_s_table(family):
    config = config_of(4 * BASE) | {"model_type": family, "head_dim": HEAD_DIM}
    plain, scaled = (build_model(config, seed=0, attention="sdpa") for _ in range(2))
    scale_initial_weights(scaled, BASE)
    train = TrainSection(steps=1, batch_rows=1, lr=0.5, weight_decay=0.1)
    names = {parameter: name for name, parameter in scaled.named_parameters()}
    settings = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in param_groups(scaled, train, BASE)
        for parameter in group["params"]
    }
    kinds, before = kinds_of_matrices(scaled), dict(plain.named_parameters())
    assert settings.keys() == before.keys()
    for name, parameter in scaled.named_parameters():
        kind = kinds.get(name, "vector")
        factor, rate, decay = {"embedding": (1, 1, 1), "hidden": (0.5, 0.25, 4), "head": (0.25, 0.25, 4), "vector": (1, 1, 0)}[kind]
        assert torch.equal(parameter, before[name] * factor), name
        assert settings[name] == pytest.approx((0.5 * rate, 0.1 * decay)), name
    assert sorted(kinds.values()) == ["embedding"] + ["head"] + ["hidden"] * 14


def problems(**changes: Any) -> list[str]:
    found = check_model(config_of(4 * BASE) | changes, tensor=1, vocab_size=64, seq_len=16, mup_base_width=changes.pop("base", BASE))
    return [text for _, text in found]


def test_what_does_not_shrink_to_the_base_is_refused_with_the_nearest_width():
    assert problems() == []
    assert problems(num_key_value_heads=2) == [
        "model.mup_base_width=32: num_key_value_heads=2 of a model of width 128 would be no whole number at that width. "
        "Nearest legal values: 64"
    ]
    preset = model_config(ModelSection(preset="llama_1b", config={"tie_word_embeddings": False}), 4096, lambda uri: b"")
    assert check_model(preset, tensor=1, vocab_size=64, seq_len=16, mup_base_width=256) == []
    assert check_model(preset, tensor=1, vocab_size=64, seq_len=16, mup_base_width=200) != []


def test_tied_embeddings_and_other_families_are_refused_by_name():
    (tied,) = problems(tie_word_embeddings=True)
    assert "cannot share weights. Set model.config.tie_word_embeddings=false" in tied
    (family,) = problems(model_type="gemma")
    assert "is for the families llama, mistral, qwen2, qwen3, not gemma" in family
    with pytest.raises(ModelError, match="shares the embedding's weights"):
        scale_initial_weights(build_model(config_of(64) | {"tie_word_embeddings": True}, seed=0, attention="sdpa"), BASE)


@pytest.mark.parametrize(("train", "model", "told"), [
    ("optimizer: sgd", "preset: llama_1m", "scales learning rates as AdamW needs it, not sgd. Nearest legal value: adamw"),
    ("optimizer: adamw", "path: /x, init: pretrained", "model.init=pretrained draws none. Nearest legal value: null"),
])  # fmt: skip
def test_what_it_says_nothing_of_is_refused(train, model, told):
    text = (
        f"run: {{name: x}}\nmodel: {{mup_base_width: 64, {model}}}\ndata: {{seq_len: 8, sources: [{{name: a, uri: /x}}]}}\n"
        f"train: {{steps: 1, batch_rows: 8, lr: 0.1, {train}}}\n"
    )
    with pytest.raises(ConfigError) as error:
        parse_run(text, "x")
    assert told in str(error.value)
