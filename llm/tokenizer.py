"""The tokenizer as a value: loaded or trained here, sent to Ray tasks, written into exports, named by a fingerprint.

Only the `tokenizers` library is used. It imports in 30 ms, where transformers takes seconds in every task that
tokenizes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers

from llm import storage
from llm.config import S3Section
from llm.errors import TokenizerError
from llm.tokenizer_training import EOS, PAD, UNK, TokenizerKind, special_tokens, train_vocabulary

__all__ = ["Tokenizer", "TokenizerKind", "load_tokenizer", "save_tokenizer", "train_tokenizer"]

TOKENIZER_JSON, CONFIG_JSON = "tokenizer.json", "tokenizer_config.json"
_OTHER_FILES = ("special_tokens_map.json", "generation_config.json", "chat_template.jinja")
_EXPORTED = ("special_tokens_map.json", "chat_template.jinja")
# Without a word from the files: the end of a document in GPT, OLMo, Llama, Gemma, Qwen, Mistral and BERT vocabularies.
# A token that ends a chat turn comes after those that end a text.
_WELL_KNOWN_EOS = (
    EOS,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "<end_of_text>",
)
_WELL_KNOWN_EOS += ("<EOS>", "<|eot_id|>", "<|im_end|>", "<|end|>", "[SEP]")
_NO_LIMIT = int(1e30)  # transformers' own word for "no maximal length known"; the export of a model writes the model's


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer by value. `files` is what an export folder needs, by name; two are equal when they give equal ids.

    `vocab_size` is the highest id + 1, added tokens included: the rows that an embedding needs. `fingerprint` is the
    SHA-256 of what determines the ids: the vocabulary, merges and rules, whatever the layout of the file, and the id
    that ends a document.
    """

    fingerprint: str
    vocab_size: int
    eos_id: int
    eos_token: str
    files: dict[str, bytes] = field(repr=False, compare=False)

    @property
    def json_text(self) -> str:
        return self.files[TOKENIZER_JSON].decode()

    def build(self, *, specials_in_text: bool = False) -> tokenizers.Tokenizer:
        """A tokenizer to encode and decode with: never truncating, never padding. 10 ms for 4096 tokens.

        A document that quotes "<|endoftext|>" does not end there: in text, special tokens are spelled out like any
        other. Give `specials_in_text` for prompts and chat templates, whose special tokens are meant.
        """
        built = tokenizers.Tokenizer.from_str(self.json_text)
        built.no_truncation()
        built.no_padding()
        built.encode_special_tokens = not specials_in_text
        return built


def load_tokenizer(path: str, eos: str | None = None, s3: S3Section | None = None) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in a folder that holds one; local or s3://.

    The token that ends a document is `eos`, or else what the folder's tokenizer_config.json, special_tokens_map.json
    and generation_config.json say, or else a well-known one. Raises TokenizerError for a file that is missing or not a
    tokenizer, and where no token ends a document; StorageError where the place cannot be read.
    """
    s3 = s3 or S3Section()
    if path.endswith(".json") and not ("://" not in path and Path(path).is_dir()):
        uri, folder = path, path.rpartition("/")[0] or "."
    else:
        uri, folder = storage.join(path, TOKENIZER_JSON), path
    if not storage.exists(uri, s3):
        raise TokenizerError(
            f"tokenizer.path={path}: there is no {uri}.\n"
            "  Give a tokenizer.json or a folder that holds one. A folder with only vocab.txt, merges.txt or "
            "tokenizer.model needs converting first: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    data = storage.read_bytes(uri, s3)
    built, content = _parse(data, uri)
    others: dict[str, bytes] = {}
    if uri.rpartition("/")[2] == TOKENIZER_JSON:  # files beside a tokenizer of another name may belong to another tokenizer
        for name in (CONFIG_JSON, *_OTHER_FILES):
            other = storage.join(folder, name)
            if storage.exists(other, s3):
                others[name] = storage.read_bytes(other, s3)
    configs = {name: _json_object(other, storage.join(folder, name)) for name, other in others.items() if name.endswith(".json")}
    eos_token = _find_eos(built, content, configs, eos, path)
    exported = {name: others[name] for name in _EXPORTED if name in others}
    return _tokenizer(built, content, data, eos_token, configs.get(CONFIG_JSON, {}), exported)


def train_tokenizer(texts: Iterator[str], kind: TokenizerKind = "bpe", vocab_size: int = 4096, *, min_frequency: int = 2) -> Tokenizer:
    """A tokenizer trained on `texts`; the same texts in the same order give the same tokenizer, byte for byte.

    It has fewer than `vocab_size` tokens, special ones included, where the texts do not yield more. `bpe` works on
    bytes, knows no unknown text and decodes to exactly what was encoded. The others know `<unk>`; wordpiece and
    wordlevel forget white space. Raises TokenizerError when `vocab_size` cannot hold the special tokens (and bpe's 256
    bytes), or there is no text.
    """
    least = len(special_tokens(kind)) + (256 if kind == "bpe" else 8)
    if vocab_size < least:
        raise TokenizerError(
            f"vocab_size={vocab_size} is too small: a {kind} tokenizer has at least {least} tokens.\n  Nearest legal value: {least}"
        )
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        raise TokenizerError("there is no text to train a tokenizer on: every input is empty.")
    built = train_vocabulary(chain([first], texts), kind, vocab_size, min_frequency)
    data = built.to_str(pretty=True).encode() + b"\n"
    config = {"pad_token": PAD} | ({} if kind == "bpe" else {"unk_token": UNK})
    return _tokenizer(built, json.loads(data), data, EOS, config, {})


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, s3: S3Section | None = None) -> None:
    """Writes the files into `folder`, local or s3://, as `transformers.AutoTokenizer.from_pretrained` reads them."""
    for name, data in sorted(tokenizer.files.items()):
        storage.write_bytes(storage.join(str(folder), name), data, s3 or S3Section())


def _tokenizer(
    built: tokenizers.Tokenizer,
    content: dict[str, Any],
    data: bytes,
    eos_token: str,
    config: dict[str, Any],
    exported: dict[str, bytes],
) -> Tokenizer:
    eos_id = built.token_to_id(eos_token)
    assert eos_id is not None, f"{eos_token!r} was looked up before"
    rules = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    canonical = json.dumps([rules, eos_id], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # The class is always the one that runs tokenizer.json as it stands: a model's own class may rebuild it with rules
    # of its own, and the exported model would then see other ids than it was trained on. auto_map would run code from
    # the folder.
    config = {key: value for key, value in config.items() if key != "auto_map"}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token}
    config = {"model_max_length": _NO_LIMIT, "clean_up_tokenization_spaces": False} | config
    config_data = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True).encode() + b"\n"
    return Tokenizer(
        fingerprint=hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest(),
        vocab_size=max(built.get_vocab(with_added_tokens=True).values()) + 1,
        eos_id=eos_id,
        eos_token=eos_token,
        files={TOKENIZER_JSON: data, CONFIG_JSON: config_data, **exported},
    )


def _parse(data: bytes, uri: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    content = _json_object(data, uri)
    try:
        if not isinstance(content.get("model"), dict):
            raise ValueError("it has no 'model' section")
        built = tokenizers.Tokenizer.from_str(data.decode("utf-8-sig"))
        if not built.get_vocab_size(with_added_tokens=True):
            raise ValueError("its vocabulary is empty")
        built.encode("a word, \u2603 and <more>")  # fails where an unknown token is named that does not exist
    except Exception as error:  # the library raises no narrower class
        raise TokenizerError(
            f"{uri} is JSON, but not a tokenizer: {error}.\n"
            "  It must be a tokenizer.json as the tokenizers library saves it, or python -m jobs.train_tokenizer."
        ) from error
    return built, content


def _json_object(data: bytes, uri: str) -> dict[str, Any]:
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise TokenizerError(f"{uri} is not JSON: {error}.\n  Give a tokenizer.json or a folder that holds one.") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{uri} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _find_eos(built: tokenizers.Tokenizer, content: dict[str, Any], configs: dict[str, dict[str, Any]], eos: str | None, path: str) -> str:
    if eos is not None:
        if built.token_to_id(eos) is not None:
            return eos
        raise TokenizerError(f"tokenizer.eos={eos!r} is not a token of {path}.\n  Nearest tokens: {_nearest(built, content, eos)}")
    for name in (CONFIG_JSON, "special_tokens_map.json"):
        token = configs.get(name, {}).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and built.token_to_id(token) is not None:
            return token
    ids = configs.get("generation_config.json", {}).get("eos_token_id")
    for eos_id in ids if isinstance(ids, list) else [ids]:
        token = built.id_to_token(eos_id) if isinstance(eos_id, int) and eos_id >= 0 else None
        if token is not None:
            return token
    for token in _WELL_KNOWN_EOS:
        if built.token_to_id(token) is not None:
            return token
    raise TokenizerError(
        f"{path} does not say which token ends a document.\n"
        f"  Name one with tokenizer.eos=TOKEN. Nearest tokens: {_nearest(built, content, EOS)}"
    )


def _nearest(built: tokenizers.Tokenizer, content: dict[str, Any], wanted: str) -> str:
    """A few tokens to offer, as text: added ones, those that look like `wanted` first; without any, others like it."""
    added = [str(token.get("content")) for token in content.get("added_tokens") or [] if isinstance(token, dict)]
    like = difflib.get_close_matches(wanted, added, n=5, cutoff=0.5)
    like += [token for token in added if token not in like][: 5 - len(like)]
    if not like:
        near_length = [token for token in built.get_vocab() if abs(len(token) - len(wanted)) <= 3]
        like = difflib.get_close_matches(wanted, near_length[:20_000], n=5, cutoff=0.5) or sorted(built.get_vocab())[:5]
    return ", ".join(repr(token) for token in like)
