"""A long text read piece by piece is the text; what is wrong with a long record is found as in a short one."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.config import CleanSection, S3Section, SourceSection
from llm.data import long_text
from llm.data import records as reading
from llm.data.clean import Cleaner
from llm.data.long_text import LongRecord, pieces
from llm.data.order import CorpusPlan
from llm.data.records import BadRecord, Document, read_slice
from llm.data.slices import plan_slices
from llm.data.sources import list_files
from llm.data.window import Packed, Recipe, make_slice
from llm.tokenizer import load_tokenizer
from tests.fuzz_corpus import decoded, small_tokenizer

S3 = S3Section()
PARTS = ["a", "b ", "\n", "\u00e9", "\u4e2d", "\U0001f600", "\\", '"', "\\\\", "/", "\t", "\x01", "\ud83d", "\ude00", "  ", "\\u00e9"]


def text_of(rng: random.Random) -> str:
    return "".join(rng.choices(PARTS, k=rng.randrange(1, 200)))


@pytest.mark.parametrize("seed", range(5))
def test_pieces_join_to_the_text_and_end_between_characters(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        monkeypatch.setattr(long_text, "PIECE_BYTES", rng.randrange(16, 60))
        monkeypatch.setattr(long_text, "LONG_STRING_BYTES", rng.randrange(8, 80))
        text = text_of(rng)
        record = {"id": "x" * rng.randrange(100), "text": text, "k" * rng.randrange(1, 90): ["a" * rng.randrange(90)] * 3}
        escaped = any(0xD800 <= ord(char) < 0xE000 for char in text) or rng.random() < 0.5
        line = json.dumps(record, ensure_ascii=escaped).encode()
        long = LongRecord(line, 1 << 20)
        found = list(long.pieces_of(long.parsed()["text"]))
        assert "".join(found) == json.loads(line)["text"]
        assert all(piece.endswith("\n") or "\n" not in piece for piece in found[:-1])
        plain = text.encode("utf-8", "replace")
        assert "".join(pieces(plain, 0, len(plain))) == plain.decode()


@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_long_line_is_bad_where_a_short_one_is(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of a line changed: the same outcome, read whole and read in pieces; in half the cases or so it is bad."""
    rng = random.Random(seed)
    num_bad = 0
    for _ in range(400):
        monkeypatch.setattr(long_text, "PIECE_BYTES", rng.randrange(16, 60))
        monkeypatch.setattr(long_text, "LONG_STRING_BYTES", rng.randrange(8, 80))
        line = bytearray(json.dumps({"id": "x" * rng.randrange(100), "text": text_of(rng)}).encode())
        line[rng.randrange(len(line))] = rng.randrange(256)
        raw = reading._Raw("u", 0, bytes(line), is_json=True)
        monkeypatch.setattr(reading, "MAX_WHOLE_BYTES", 1 << 20)
        whole = reading._parse(raw, "text")
        monkeypatch.setattr(reading, "MAX_WHOLE_BYTES", 1)
        monkeypatch.setattr(reading, "LongRecord", lambda line, _: LongRecord(line, 1 << 20))
        in_pieces = reading._parse(raw, "text")
        if isinstance(whole, Document):
            assert isinstance(in_pieces, Document) and in_pieces.text + "".join(in_pieces.rest) == whole.text
        else:
            assert isinstance(in_pieces, BadRecord), in_pieces
            num_bad += 1
    assert 50 < num_bad < 350


def test_what_stands_beside_long_strings_is_limited() -> None:
    line = json.dumps({"text": "x" * 100_000, "ids": list(range(1000))}).encode()
    assert LongRecord(line, 5000).parsed()["ids"][-1] == 999
    with pytest.raises(ValueError, match="beside its long strings"):
        LongRecord(line, 4000)


def test_the_mark_of_a_long_string_cannot_be_written_down() -> None:
    line = json.dumps({"text": "0", "long": "y" * 100_000}).encode()
    record = LongRecord(line, 5000)
    assert list(record.pieces_of(record.parsed()["text"])) == ["0"]
    assert long_text._MARK not in record.rest.replace(f"{long_text._MARK}0", "") and len(long_text._MARK) == 32


@pytest.mark.parametrize("section", [CleanSection(), CleanSection(normalize_whitespace=False, min_chars=100)])
def test_clean_pieces_clean_as_the_whole(section: CleanSection) -> None:
    """Where no blank lines stand at the cuts. Counts too."""
    rng = random.Random(0)
    for _ in range(200):
        lines = ["".join(rng.choices("ab\u00e9\x01\U0001f600\ud83d", k=rng.randrange(1, 9))) + "x" for _ in range(rng.randrange(1, 30))]
        cuts = sorted({0, len(lines), *(rng.randrange(len(lines)) for _ in range(4))})
        parts = ["\n".join(lines[i:j]) + ("\n" if j < len(lines) else "") for i, j in pairwise(cuts)]
        whole, piecewise = Cleaner(section), Cleaner(section)
        assert (whole.clean("".join(parts)) or "") == "".join(piecewise.clean_pieces(parts))
        assert whole.counts == piecewise.counts


def packed(folder: Path, uri: Path) -> list[Packed]:
    recipe = Recipe(cast(CorpusPlan, None), load_tokenizer(str(folder)), "tokenizers", 63, CleanSection(), {"docs": "text"}, S3)
    found = plan_slices("docs", list_files(SourceSection(name="docs", uri=str(uri), weight=None), S3), 1 << 20)
    return [made for piece in found if len((made := make_slice(recipe, piece)).documents)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_a_long_record_is_one_document(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_WHOLE_BYTES", 5000)
    monkeypatch.setattr(long_text, "PIECE_BYTES", 1000)
    monkeypatch.setattr(long_text, "LONG_STRING_BYTES", 1000)
    small_tokenizer(tmp_path / "tokenizer")
    long = "".join(f"line {i} of a book\n" for i in range(3000))
    texts = ["first", long, "between", long.replace("book", "caf\u00e9 \U0001f600"), "last"]
    texts = [long] if name == "a.txt" else texts
    path = tmp_path / name
    if name == "a.txt":
        path.write_text(long)
    elif name == "a.jsonl":
        path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    else:
        pq.write_table(pa.table({"text": texts}), path)
    read = [r for p in plan_slices("docs", list_files(SourceSection(name="docs", uri=str(path), weight=None), S3), 1 << 20)
            for r in read_slice(p, "text", S3)]  # fmt: skip
    assert sorted(r.text + "".join(r.rest) for r in read if isinstance(r, Document)) == sorted(texts)
    found = packed(tmp_path / "tokenizer", path)
    built = load_tokenizer(str(tmp_path / "tokenizer")).build()
    assert sorted(text for each in found for text in decoded(each, built)) == sorted(text.strip("\n") for text in texts)
    assert sum(each.counts["documents"] for each in found) == sum(len(each.documents) for each in found) == len(texts)
    ends = sum(int(np.count_nonzero(each.rows.ids == load_tokenizer(str(tmp_path / "tokenizer")).eos_id)) for each in found)
    padding = sum(each.rows.ids.size - int(each.rows.filled.sum()) for each in found)
    assert ends - padding == len(texts)
