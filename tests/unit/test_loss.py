"""Packed rows: what the model gets, which labels count, and that documents kept apart cannot see one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import TypeCheckError, jaxtyped

from llm.model import loss
from llm.model.build import build_model
from llm.model.families import ISOLATES

model_inputs = jaxtyped(typechecker=beartype)(loss.model_inputs)
sum_loss = jaxtyped(typechecker=beartype)(loss.sum_loss)

VOCAB = 61
LLAMA_LIKE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
WINDOW = {"sliding_window": 4}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA_LIKE},
    "mistral": {"model_type": "mistral", **LLAMA_LIKE, **WINDOW},
    "qwen2": {"model_type": "qwen2", **LLAMA_LIKE, **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", **LLAMA_LIKE, "head_dim": 16},
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gemma": {"model_type": "gemma", **LLAMA_LIKE, "head_dim": 16},
    "olmo2": {"model_type": "olmo2", **LLAMA_LIKE},
    "phi": {"model_type": "phi", **LLAMA_LIKE},
    "gpt_neox": {"model_type": "gpt_neox", **LLAMA_LIKE},
}
# Row 0: documents of 9, 10 and 4 ids and padding; row 1: of 1, 20 and 4 ids, no padding.
SEGMENTS = torch.tensor([[1] * 9 + [2] * 10 + [3] * 4 + [0] * 2, [1] + [2] * 20 + [3] * 4])


def random_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, SEGMENTS.shape, generator=torch.Generator().manual_seed(3))


def test_the_example_of_the_docstring() -> None:
    ids, segments = torch.tensor([[5, 6, 7, 8, 9, 0]]), torch.tensor([[1, 1, 2, 2, 2, 0]])
    inputs, labels, valid = model_inputs(ids, segments, True)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert labels.tolist() == [[6, 7, 8, 9, 0]]
    assert valid.tolist() == [[True, False, True, True, False]]
    inputs, labels, valid = model_inputs(ids, segments, False)
    assert set(inputs) == {"input_ids"}
    assert valid.tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16, torch.int64])
def test_narrow_ids_become_the_ids_that_models_take(dtype: torch.dtype) -> None:
    inputs, labels, _ = loss.model_inputs(random_ids().to(dtype), SEGMENTS.to(torch.int32), True)
    assert {inputs["input_ids"].dtype, inputs["position_ids"].dtype, labels.dtype} == {torch.int64}


def test_positions_restart_at_every_document_and_in_the_padding() -> None:
    positions = loss.positions_within_documents(SEGMENTS)
    assert positions[0].tolist() == [*range(9), *range(10), *range(4), *range(2)]
    assert positions[1].tolist() == [0, *range(20), *range(4)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_documents_kept_apart_give_what_each_gives_alone(name: str, attention: str) -> None:
    assert name in ISOLATES
    model = build_model(CASES[name], seed=1, attention=attention)
    ids = random_ids()
    inputs, labels, valid = model_inputs(ids, SEGMENTS, True)
    with torch.no_grad():
        packed = model(**inputs).logits
        alone_loss = torch.zeros(())
        for row, document in ((row, document) for row in range(2) for document in (1, 2, 3)):
            places = (SEGMENTS[row, :-1] == document).nonzero().flatten()
            alone = model(input_ids=ids[row, places][None]).logits[0]
            torch.testing.assert_close(packed[row, places], alone, atol=1e-5, rtol=1e-5)
            whole = ids[row, SEGMENTS[row] == document]
            alone_loss += F.cross_entropy(alone[: len(whole) - 1], whole[1:], reduction="sum")
    assert int(valid.sum()) == (8 + 9 + 3) + (0 + 19 + 3)
    torch.testing.assert_close(sum_loss(packed, labels, valid), alone_loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_changes_nothing_before_it(name: str, attention: str) -> None:
    model = build_model(CASES[name], seed=1, attention=attention)
    ids, others = random_ids()[:1], random_ids()[:1]
    others[:, -2:] = 7  # the padding of row 0
    losses = []
    with torch.no_grad():
        for row in (ids, others):
            inputs, labels, valid = model_inputs(row, SEGMENTS[:1], False)
            losses.append(sum_loss(model(**inputs).logits, labels, valid))
    assert losses[0] == losses[1]


def test_without_isolation_a_row_is_one_causal_text() -> None:
    model = build_model(CASES["llama"], seed=1, attention="sdpa")
    inputs, _, valid = model_inputs(random_ids(), SEGMENTS, False)
    with torch.no_grad():
        apart = model(**model_inputs(random_ids(), SEGMENTS, True)[0]).logits
        together = model(**inputs).logits
    torch.testing.assert_close(apart[0, :9], together[0, :9])
    assert (apart[0, 9:22] - together[0, 9:22]).abs().max() > 1e-3
    assert int(valid.sum()) == 22 + 24


def test_the_sum_is_in_nats_over_valid_labels_in_fp32() -> None:
    logits = torch.zeros(1, 3, 8, dtype=torch.bfloat16)
    labels, valid = torch.tensor([[1, 2, 3]]), torch.tensor([[True, False, True]])
    total = sum_loss(logits, labels, valid)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(2 * torch.log(torch.tensor(8.0)).item(), abs=1e-6)


def test_a_row_without_valid_labels_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(1, 3, 8, requires_grad=True)
    total = sum_loss(logits, torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool))
    total.backward()
    assert total.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises((TypeCheckError, BeartypeCallHintParamViolation)):
        sum_loss(torch.zeros(2, 3, 8), torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool))
