"""Claims about tokenizers: trained, saved or loaded they give the same ids everywhere, or say why they cannot."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import TokenizerError
from llm.tokenizer import Tokenizer, TokenizerKind, load_tokenizer, save_tokenizer, train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 20,
    "def area(width, height):\n    return width * height\n" * 30,
    "Ünïcödé täxt, 日本語のテキスト, кириллица. " * 9,
]
KINDS = get_args(TokenizerKind)
SENTENCE = "The lazy fox returns: def jump(x):\n    return  x * 2"


def _train(kind: TokenizerKind = "bpe", vocab_size: int = 400) -> Tokenizer:
    return train_tokenizer(iter(TEXTS), kind, vocab_size)


BPE = _train()
BUILT = BPE.build()


def _folder(path: Path, tokenizer: Tokenizer = BPE, **files: Any) -> Path:
    """A folder with only tokenizer.json, and the named files (without .json) beside it."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"])
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def _with_tokens(*tokens: str) -> Tokenizer:
    """BPE whose special tokens have other names."""
    content = json.loads(BPE.json_text)
    for old, new in zip(("<|endoftext|>", "<pad>"), tokens, strict=True):
        content["model"]["vocab"][new] = content["model"]["vocab"].pop(old)
        content["added_tokens"][content["model"]["vocab"][new]]["content"] = new
    return Tokenizer("", 0, 0, "", {"tokenizer.json": json.dumps(content).encode()})


@settings(deadline=None)  # a busy machine is no failure
@given(st.text())
def test_bpe_decodes_to_what_was_encoded(text: str) -> None:
    assert BUILT.decode(BUILT.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<pad>b", " leading", "\r\n\t ", "\u2581x", "é", "e\u0301", "\U0001f600\u200d"])
def test_bpe_decodes_difficult_text(text: str) -> None:
    built = BPE.build()
    assert built.decode(built.encode(text).ids) == text


def test_unigram_keeps_spaces_and_lines() -> None:
    built = _train("unigram").build()
    assert built.decode(built.encode(SENTENCE.replace("2", "width")).ids) == SENTENCE.replace("2", "width")


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(kind: TokenizerKind) -> None:
    first, *others = [_train(kind) for _ in range(4)]
    assert all(other.files == first.files and other == first for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_is_no_larger_than_asked(kind: TokenizerKind) -> None:
    for vocab_size in (270, 300, 10_000):
        tokenizer = _train(kind, vocab_size)
        vocab = tokenizer.build().get_vocab()
        assert len(vocab) == tokenizer.vocab_size == max(vocab.values()) + 1 <= vocab_size
        assert vocab[tokenizer.eos_token] == tokenizer.eos_id
        assert len(tokenizer.build().encode(SENTENCE).ids) < len(SENTENCE)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizer_loads_equal(kind: TokenizerKind, tmp_path: Path) -> None:
    tokenizer = _train(kind)
    save_tokenizer(tokenizer, tmp_path / "new")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = load_tokenizer(str(path))
        assert loaded == tokenizer
        assert loaded.files == tokenizer.files


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids(kind: TokenizerKind, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = _train(kind)
    save_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, SENTENCE, "  two  spaces ,  and a comma"]:
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.build().encode(text, add_special_tokens=False).ids
        assert theirs.decode(ids) == tokenizer.build().decode(ids, skip_special_tokens=False)
    assert (theirs.eos_token, theirs.eos_token_id) == (tokenizer.eos_token, tokenizer.eos_id)
    assert len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_quotes_the_eos_token_does_not_end(kind: TokenizerKind) -> None:
    tokenizer = _train(kind)
    text = "fox<|endoftext|>fox"
    assert tokenizer.eos_id not in tokenizer.build().encode(text).ids
    assert tokenizer.eos_id in tokenizer.build(specials_in_text=True).encode(text).ids


def test_truncation_and_padding_are_off(tmp_path: Path) -> None:
    built = BPE.build()
    built.enable_truncation(4)
    built.enable_padding(length=64)
    (tmp_path / "tokenizer.json").write_text(built.to_str())
    tokenizer = load_tokenizer(str(tmp_path))
    short, long = tokenizer.build().encode_batch(["a", SENTENCE])
    assert len(short.ids) == 1
    assert len(long.ids) > 4
    assert tokenizer.fingerprint == BPE.fingerprint


def test_a_tokenizer_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(BPE))  # noqa: S301
    assert copy == BPE
    assert copy.files == BPE.files
    assert hash(copy) == hash(BPE)


def test_the_fingerprint_names_the_ids_and_not_the_layout(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a")
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(BPE.json_text), indent=8, sort_keys=True))
    assert load_tokenizer(str(folder)).fingerprint == BPE.fingerprint
    assert load_tokenizer(str(folder), eos="<pad>").fingerprint != BPE.fingerprint
    assert _train(vocab_size=300).fingerprint != BPE.fingerprint


@pytest.mark.parametrize(
    ("files", "eos", "expected"),
    [
        ({}, None, "<|endoftext|>"),
        ({}, "<pad>", "<pad>"),
        ({"tokenizer_config": {"eos_token": "<pad>"}}, None, "<pad>"),
        ({"tokenizer_config": {"eos_token": {"content": "<pad>", "lstrip": False}}}, None, "<pad>"),
        ({"tokenizer_config": {"eos_token": "<pad>"}}, "<|endoftext|>", "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": "not there"}}, None, "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<pad>"}}, None, "<pad>"),
        ({"generation_config": {"eos_token_id": 1}}, None, "<pad>"),
        ({"generation_config": {"eos_token_id": [1, 0]}}, None, "<pad>"),
        ({"generation_config": {"eos_token_id": 99_999}}, None, "<|endoftext|>"),
    ],
)
def test_where_the_eos_token_comes_from(files: dict[str, Any], eos: str | None, expected: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(_folder(tmp_path, **files)), eos)
    assert tokenizer.eos_token == expected
    assert tokenizer.eos_id == tokenizer.build().token_to_id(expected)
    assert json.loads(tokenizer.files["tokenizer_config.json"])["eos_token"] == expected


@pytest.mark.parametrize("known", ["</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "[SEP]", "[EOS]"])
def test_well_known_eos_names(known: str, tmp_path: Path) -> None:
    assert load_tokenizer(str(_folder(tmp_path, _with_tokens(known, "<x>")))).eos_token == known


def test_no_eos_token_names_the_fix_and_candidates(tmp_path: Path) -> None:
    folder = _folder(tmp_path, _with_tokens("<|endtext|>", "<x>"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.eos=TOKEN.*'<\|endtext\|>'"):
        load_tokenizer(str(folder))
    with pytest.raises(TokenizerError, match=r"tokenizer\.eos='<\|end\|>' is not a token of .*\n.*'<\|endtext\|>'"):
        load_tokenizer(str(folder), "<|end|>")


def test_exported_config_keeps_what_is_safe(tmp_path: Path) -> None:
    config = {
        "tokenizer_class": "Odd",
        "auto_map": {"AutoTokenizer": "x.Odd"},
        "model_max_length": 77,
        "eos_token": "<pad>",
    }
    folder = _folder(tmp_path, tokenizer_config=config, special_tokens_map={"pad_token": "<pad>"}, unrelated={})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    files = load_tokenizer(str(folder)).files
    assert sorted(files) == [
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    exported = json.loads(files["tokenizer_config.json"])
    assert "auto_map" not in exported
    assert exported["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert exported["model_max_length"] == 77


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "there is no"),
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b"{}", "not a tokenizer: it has no 'model' section"),
        (b'{"model": {}}', "is JSON, but not a tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "its vocabulary is empty"),
        (b'{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}', "is JSON, but not a tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_named_with_the_rule(content: bytes | None, rule: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=rule) as error:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path / "tokenizer.json") in str(error.value)


@pytest.mark.parametrize(("kind", "least"), [("bpe", 258), ("unigram", 11), ("wordpiece", 11), ("wordlevel", 11)])
def test_a_vocabulary_that_is_too_small_names_the_least(kind: TokenizerKind, least: int) -> None:
    assert _train(kind, least).vocab_size <= least
    with pytest.raises(TokenizerError, match=f"vocab_size={least - 1} .*\n  Nearest legal value: {least}"):
        _train(kind, least - 1)


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_no_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer(iter(texts))
