"""Building models: the same weights from the same seed, exactly the folder's weights, errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm.errors import ModelError
from llm.model.build import build_model, enable_activation_checkpointing
from llm.model.presets import PRESETS

TINY = PRESETS["llama_1m"] | {"num_hidden_layers": 2, "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_model(TINY, seed=5, attention="sdpa").save_pretrained(tmp_path)
    return tmp_path


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_weights_follow_from_the_seed_alone() -> None:
    first = weights(build_model(TINY, seed=1, attention="sdpa"))
    torch.rand(3)
    again = weights(build_model(TINY, seed=1, attention="eager"))
    other = weights(build_model(TINY, seed=2, attention="sdpa"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_building_leaves_the_global_random_state_as_it_was() -> None:
    before = torch.get_rng_state()
    build_model(TINY, seed=1, attention="sdpa")
    assert torch.equal(before, torch.get_rng_state())


def test_the_model_is_ready_to_train_and_keeps_no_cache() -> None:
    model = build_model(TINY, seed=1, attention="sdpa")
    assert model.training
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).past_key_values is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    half = build_model(TINY | {"dtype": "float16"}, seed=1, attention="sdpa", dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())


def test_the_config_is_not_changed_by_building() -> None:
    before = json.dumps(TINY)
    build_model(TINY, seed=1, attention="sdpa")
    assert json.dumps(TINY) == before


def test_a_folder_gives_its_own_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    loaded = weights(build_model(config, seed=0, attention="sdpa", pretrained=str(folder)))
    stored = weights(build_model(TINY, seed=5, attention="sdpa"))
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"intermediate_size": 64}, "of another shape"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2"),
        ({"num_hidden_layers": 1}, "of no use: model.layers.1"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, change: dict[str, int], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build_model(TINY | change, seed=0, attention="sdpa", pretrained=str(folder))


def test_only_safetensors_are_read(folder: Path) -> None:
    with pytest.raises(ModelError, match="is no local folder"):
        build_model(TINY, seed=0, attention="sdpa", pretrained=str(folder / "nowhere"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin could run code when read"):
        build_model(TINY, seed=0, attention="sdpa", pretrained=str(folder))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "lama"}, "Nearest legal name: llama"),
        ({"model_type": None}, "is no causal language model"),
        ({"num_attention_heads": 5}, "refuses its config: .*not a multiple of the number of attention heads"),
        ({"hidden_size": "many"}, "refuses its config"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"hidden_act": "no_such_one"}, "cannot be built: it has no 'no_such_one'"),
    ],
)
def test_an_impossible_config_says_why(change: dict[str, object], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build_model(TINY | change, seed=0, attention="sdpa")


def test_an_attention_that_is_not_there_says_so() -> None:
    with pytest.raises(ModelError, match="a llama model cannot be built"):
        build_model(TINY, seed=0, attention="no_such_attention")


def test_code_of_a_folder_is_never_run() -> None:
    config = TINY | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "architectures": ["Evil"]}
    assert type(build_model(config, seed=0, attention="sdpa")).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["llama_1m", "gpt2_124m"])
def test_activation_checkpointing_changes_memory_and_no_number(name: str) -> None:
    small = {"num_hidden_layers": 2} if name == "llama_1m" else {"n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 96}
    plain, checkpointed = (build_model(PRESETS[name] | small, seed=1, attention="sdpa") for _ in range(2))
    enable_activation_checkpointing(checkpointed)
    ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    saved = []
    for model in (plain, checkpointed):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = model(input_ids=ids).logits.square().mean()
        loss.backward()
        saved.append(sum(kept))
    assert saved[1] < saved[0]
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in (plain, checkpointed)]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    bert = {"model_type": "bert", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert |= {"intermediate_size": 48, "max_position_embeddings": 64}
    with pytest.raises(ModelError, match=r"bert model sees the tokens after the one that it predicts.*is_decoder=true"):
        build_model(bert, seed=0, attention="sdpa")
    build_model(bert | {"is_decoder": True}, seed=0, attention="sdpa")


def test_other_decoders_are_taken() -> None:
    gptj = {"model_type": "gptj", "vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 32}
    build_model(gptj, seed=0, attention="eager")
