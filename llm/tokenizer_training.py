"""The four kinds of vocabulary, trained so that the same texts give the same tokens in the same order.

The library's byte-level BPE and word-level trainers are deterministic. Its WordPiece trainer numbers "##x" pieces in
the order of a randomly seeded hash map, its Unigram trainer adds up floats in such an order: ties and near-ties then
fall differently in every process. So WordPiece gets its pieces numbered beforehand, and Unigram is trained here.
"""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TokenizerKind = Literal["bpe", "wordpiece", "unigram", "wordlevel"]
EOS, PAD, UNK = "<|endoftext|>", "<pad>", "<unk>"

_ALPHABET_FRAC = 0.25  # at most this share of a vocabulary is single characters; rarer ones become <unk>
_SEED_FACTOR = 2  # Unigram starts from this many times the pieces that it ends with
_ROUNDS = 3  # in which it sheds the surplus
_SUBWORD = "##"
_SPACE = "\u2581"  # Unigram's visible space
# Letters, digits or signs with the spaces before them, or a line's end: runs of spaces stay together, as code needs it.
_UNIGRAM_WORD = rf"{_SPACE}*\p{{L}}+|{_SPACE}*\p{{N}}+|{_SPACE}*[^\p{{L}}\p{{N}}{_SPACE}\n]+|\n|{_SPACE}+"


def special_tokens(kind: TokenizerKind) -> list[str]:
    return [EOS, PAD] if kind == "bpe" else [EOS, PAD, UNK]


def train_vocabulary(texts: Iterable[str], kind: TokenizerKind, vocab_size: int, min_frequency: int) -> Tokenizer:
    """A library tokenizer of at most `vocab_size` tokens. Wordpiece and unigram hold all of `texts` in memory."""
    if kind == "bpe":
        return _train_bpe(texts, vocab_size, min_frequency)
    if kind == "wordpiece":
        return _train_wordpiece([_NFC.normalize_str(text) for text in texts], vocab_size, min_frequency)
    if kind == "unigram":
        return _train_unigram(list(texts), vocab_size)
    new = Tokenizer(models.WordLevel(unk_token=UNK))
    new.normalizer = _NFC
    new.pre_tokenizer = pre_tokenizers.Whitespace()
    _train(new, texts, trainers.WordLevelTrainer(min_frequency=min_frequency, **_common(kind, vocab_size)))
    return new


_NFC = normalizers.NFC()


def _train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    new = Tokenizer(models.BPE())
    new.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    new.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    common = _common("bpe", vocab_size)
    _train(new, texts, trainers.BpeTrainer(min_frequency=min_frequency, initial_alphabet=alphabet, **common))
    return new


def _train_wordpiece(texts: list[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    new = Tokenizer(models.WordPiece(unk_token=UNK))
    new.normalizer = _NFC
    new.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    new.decoder = decoders.WordPiece(prefix=_SUBWORD, cleanup=False)
    # Half of the share, because every character is there twice: as a beginning and as a continuation.
    alphabet = _alphabet(texts, int(vocab_size * _ALPHABET_FRAC / 2), string.whitespace)
    specials = special_tokens("wordpiece")
    numbered = [*specials, *alphabet, *(_SUBWORD + char for char in alphabet)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in numbered],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_SUBWORD,
    )
    _train(new, texts, trainer)
    content = json.loads(new.to_str())  # the characters were special only to be numbered
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in specials]
    return Tokenizer.from_str(json.dumps(content))


def _train_unigram(texts: list[str], vocab_size: int) -> Tokenizer:
    """Unigram pieces by hard expectation-maximization (Kudo 2018, 3.2, with the best segmentation alone).

    The seed is a BPE vocabulary of twice the size. A round counts the pieces in the best segmentation of every word,
    keeps the most frequent, and takes the logarithms of their frequencies as scores. Single characters are never shed.
    """
    spaces = normalizers.Sequence([_NFC, normalizers.Replace(" ", _SPACE)])
    split = pre_tokenizers.Split(Regex(_UNIGRAM_WORD), "isolated")
    texts = [spaces.normalize_str(text) for text in texts]
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    num_pieces = vocab_size - len(special_tokens("unigram"))
    alphabet = [_SPACE, *_alphabet(texts, int(num_pieces * _ALPHABET_FRAC), _SPACE)]
    seed = Tokenizer(models.BPE())
    seed.pre_tokenizer = split
    seed_size = _SEED_FACTOR * num_pieces
    trainer = trainers.BpeTrainer(
        vocab_size=seed_size,
        min_frequency=2,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    _train(seed, texts, trainer)
    seed.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]
    counts = _count_pieces(seed, words)
    model = models.Unigram([(UNK, 0.0)], 0, False)
    for i in range(1, _ROUNDS + 1):
        size = round(seed_size * (num_pieces / seed_size) ** (i / _ROUNDS))
        model = _unigram(counts, alphabet, size)
        if i < _ROUNDS:
            counts = _count_pieces(Tokenizer(model), words)
    new = Tokenizer(model)
    new.normalizer = spaces
    new.pre_tokenizer = split
    new.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.Fuse()])
    # Added and not part of the model: the best segmentation of a text that quotes them would pick them.
    new.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (UNK, EOS, PAD)])
    return new


def _unigram(counts: Counter[str], alphabet: list[str], num_pieces: int) -> Any:
    frequent = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece))
    pieces = [*alphabet, *frequent][:num_pieces]
    total = sum(max(1, counts[piece]) for piece in pieces)
    scored = [(piece, math.log(max(1, counts[piece]) / total)) for piece in pieces]
    return models.Unigram([(UNK, min(score for _, score in scored)), *scored], 0, False)


def _count_pieces(tokenizer: Tokenizer, words: Counter[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    encodings = tokenizer.encode_batch(list(words), add_special_tokens=False)
    for encoding, count in zip(encodings, words.values(), strict=True):
        for piece in encoding.tokens:
            counts[piece] += count
    return counts


def _alphabet(texts: Iterable[str], at_most: int, without: str) -> list[str]:
    """The most frequent characters but those in `without`, sorted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    chars = sorted(set(counts).difference(without), key=lambda char: (-counts[char], char))
    return sorted(chars[:at_most])


def _common(kind: TokenizerKind, vocab_size: int) -> dict[str, Any]:
    added = [AddedToken(token, special=True, normalized=False) for token in special_tokens(kind)]
    return {"vocab_size": vocab_size, "special_tokens": added, "show_progress": False}


def _train(new: Tokenizer, texts: Iterable[str], trainer: Any) -> None:
    def strings() -> Iterator[str]:
        yield from texts

    new.train_from_iterator(strings(), trainer)
