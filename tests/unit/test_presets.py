"""Presets and the plain config of a model: overrides, folders, and the checks before anything is built."""

from __future__ import annotations

import copy
import json

import pytest

from llm.config import ModelSection
from llm.errors import ModelError
from llm.model.checks import check_model
from llm.model.families import ALIASES, ISOLATES, TENSOR_PARALLEL, WHY_NOT_SPLIT, field
from llm.model.presets import PRESETS, model_config


def no_file(path: str) -> bytes:
    raise FileNotFoundError(path)


def one_file(config: dict[str, object]):
    return lambda path: json.dumps(config).encode() if path == "folder/config.json" else no_file(path)


def keys(problems: list[tuple[str, str]]) -> list[str]:
    return [key for key, _ in problems]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_returned_whole_and_never_shared(name: str) -> None:
    before = copy.deepcopy(PRESETS)
    config = model_config(ModelSection(preset=name), None, no_file)
    assert config == PRESETS[name]
    config["vocab_size"] = 0
    if config.get("rope_parameters"):
        config["rope_parameters"]["rope_theta"] = 0
    assert before == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_no_problems_of_their_own(name: str) -> None:
    config = PRESETS[name]
    tensor = 1 if name == "gpt2_124m" else 2
    assert check_model(config, tensor=tensor, vocab_size=4096, seq_len=1024, isolate=True) == []


def test_overrides_use_either_name_of_a_size() -> None:
    section = ModelSection(preset="gpt2_124m", config={"num_hidden_layers": 2, "n_embd": 96})
    config = model_config(section, None, no_file)
    assert (config["n_layer"], config["n_embd"]) == (2, 96)
    assert "num_hidden_layers" not in config
    with pytest.raises(ModelError, match="names n_layer twice"):
        model_config(ModelSection(preset="gpt2_124m", config={"num_hidden_layers": 2, "n_layer": 3}), None, no_file)


@pytest.mark.parametrize(
    ("preset", "key", "nearest"),
    [
        ("llama_1m", "hidden_sise", "hidden_size"),
        ("llama_1m", "n_embd", None),
        ("gpt2_124m", "n_layers", "n_layer"),
        ("gpt2_124m", "rms_norm_eps", None),
    ],
)
def test_an_unknown_override_names_the_nearest_key(preset: str, key: str, nearest: str | None) -> None:
    with pytest.raises(ModelError, match=f"model.config.{key} is no key of a") as caught:
        model_config(ModelSection(preset=preset, config={key: 1}), None, no_file)
    assert nearest is None or str(caught.value).endswith(f"Nearest legal name: {nearest}")


@pytest.mark.parametrize("key", ["model_type", "torch_dtype", "dtype", "use_cache", "attn_implementation"])
def test_keys_that_another_section_owns_are_refused(key: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.config\.{key} cannot be set here"):
        model_config(ModelSection(preset="llama_1m", config={key: "x"}), None, no_file)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="Nearest legal name: llama_1m"):
        model_config(ModelSection(preset="lama_1m"), None, no_file)


def test_a_folder_gives_its_config_with_its_own_extra_keys() -> None:
    stored = {"model_type": "llama", "hidden_size": 64, "pretraining_tp": 1}
    section = ModelSection(path="folder/", config={"pretraining_tp": 2, "num_hidden_layers": 3})
    assert model_config(section, None, one_file(stored)) == stored | {"pretraining_tp": 2, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("reader", "told"),
    [
        (no_file, "no readable config.json"),
        (lambda path: b"{", "is not JSON"),
        (lambda path: b"\xff\xfe\xfa", "is not JSON"),
        (lambda path: b"[]", "does not say which model"),
        (lambda path: b'{"hidden_size": 3}', "does not say which model"),
    ],
)
def test_a_folder_without_a_usable_config_is_an_error(reader, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        model_config(ModelSection(path="folder"), None, reader)


def test_the_vocabulary_follows_the_tokenizer_only_where_nothing_fixes_it() -> None:
    stored = {"model_type": "llama", "vocab_size": 64}
    random, own = ModelSection(preset="llama_1m"), ModelSection(preset="llama_1m", config={"vocab_size": 9000})
    assert model_config(random, 5000, no_file)["vocab_size"] == 5000
    assert model_config(own, 5000, no_file)["vocab_size"] == 9000
    assert model_config(ModelSection(path="folder"), 70, one_file(stored))["vocab_size"] == 70
    pretrained = ModelSection(path="folder", init="pretrained")
    assert model_config(pretrained, 70, one_file(stored))["vocab_size"] == 64


def test_every_broken_rule_is_found_at_once_with_values_and_fixes() -> None:
    config = PRESETS["llama_1m"] | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 130}
    problems = check_model(config, tensor=4, vocab_size=5000, seq_len=4096)
    assert keys(problems) == [
        "model.config.vocab_size",
        "data.seq_len",
        "model.config.hidden_size",
        "parallel.tensor",
        "parallel.tensor",
    ]
    told = [message for _, message in problems]
    assert "5000 ids, the model's vocabulary 4096" in told[0]
    assert "Nearest legal value: 2048" in told[1]
    assert "Nearest legal values: 126, 132" in told[2]
    assert "num_attention_heads=6. Nearest legal values: 3, 6. Or set model.config.num_attention_heads" in told[3]
    assert "num_key_value_heads=3. Nearest legal values: 3" in told[4]


def test_key_value_heads_must_divide_the_heads() -> None:
    config = PRESETS["llama_1m"] | {"num_key_value_heads": 3}
    assert keys(check_model(config, tensor=1, vocab_size=64, seq_len=64)) == ["model.config.num_key_value_heads"]


def test_a_head_dim_frees_the_hidden_size_where_the_family_allows_it() -> None:
    sizes = {"hidden_size": 100, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
    assert check_model({"model_type": "qwen3", **sizes}, tensor=1, vocab_size=64, seq_len=64) == []
    assert check_model({"model_type": "llama", **sizes}, tensor=1, vocab_size=64, seq_len=64) != []


@pytest.mark.parametrize("alias", ALIASES["max_position_embeddings"])
def test_the_row_fits_the_positions_under_every_name(alias: str) -> None:
    config = {"model_type": "gpt2", alias: 128}
    assert check_model(config, tensor=1, vocab_size=64, seq_len=128) == []
    assert keys(check_model(config, tensor=1, vocab_size=64, seq_len=129)) == ["data.seq_len"]


@pytest.mark.parametrize("family", ["gpt2", "openai-gpt", "mixtral", "some_new_one"])
def test_families_that_cannot_be_split_are_refused_by_name_only_in_tensor_groups(family: str) -> None:
    config = {"model_type": family, "num_attention_heads": 4}
    assert check_model(config, tensor=1, vocab_size=64, seq_len=64) == []
    [(key, message)] = check_model(config, tensor=2, vocab_size=64, seq_len=64)
    assert key == "parallel.tensor"
    assert f"a {family} model cannot be split" in message
    assert "Nearest legal value: 1" in message


def test_isolation_is_refused_where_positions_do_not_isolate() -> None:
    assert "opt" not in ISOLATES
    found = check_model({"model_type": "opt"}, tensor=1, vocab_size=64, seq_len=64, isolate=True)
    assert keys(found) == ["data.isolate_documents"]
    config = PRESETS["llama_1m"]
    found = check_model(config, tensor=1, vocab_size=64, seq_len=64, isolate=True, attention="flash_attention_2")
    assert keys(found) == ["data.isolate_documents"]


def test_family_tables_agree() -> None:
    assert not TENSOR_PARALLEL & WHY_NOT_SPLIT.keys()
    assert field({"n_inner": None, "ffn_dim": 7}, "intermediate_size") == 7
    assert field({}, "head_dim", 5) == 5


@pytest.mark.parametrize(("key", "value", "near"), [
    ("hidden_size", "abc", 1), ("num_hidden_layers", 0, 1), ("num_hidden_layers", -1, 1), ("num_attention_heads", [4], 1),
    ("max_position_embeddings", 0, 1), ("head_dim", 15.6, 16), ("vocab_size", True, 1),
])  # fmt: skip
def test_sizes_are_whole_numbers_above_zero(key: str, value: object, near: int) -> None:
    config = PRESETS["llama_1m"] | {key: value}
    [(where, told)] = check_model(config, tensor=1, vocab_size=96, seq_len=16)
    assert where == f"model.config.{key}" and told.endswith(f"must be a whole number of at least 1. Nearest legal value: {near}")
