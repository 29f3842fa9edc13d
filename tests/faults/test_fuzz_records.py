"""Malformed records: each is counted once, as a document or as bad; none stops the reading or takes much memory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest

from llm.data.encode import Engine
from tests.fuzz_corpus import GIANTS, Corpus, Made, bomb, giant_corpus, line, made_corpus, read_in_a_process, small_tokenizer, words

MAX_MB = 256  # more than ordinary files take
RECORDS, PARTS = 100_000, 5
BOMBS = [f"{suffix} {kind}" for suffix in (".jsonl.zst", ".jsonl.gz") for kind in ("zeros", "newlines", "records")]
BOMBS += [".txt.zst zeros", ".txt.zst lines", ".txt.gz lines"]


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    small_tokenizer(folder / "tokenizer")
    return folder


@lru_cache(maxsize=2)
def ordinary_mb(root: Path, engine: Engine) -> float:
    """What reading ordinary files of all formats takes."""
    corpus = Corpus(root / f"ordinary {engine}", 0)
    made: list[Made] = [(line(text := " ".join(words(corpus.rng) for _ in range(40))), text) for _ in range(3000)]
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
        corpus.add_lines(suffix, made)
    corpus.add_rows(made)
    return read_in_a_process(corpus.folder, engine)["peak_mb"]


def check(corpus: Corpus, engine: Engine, all_known: bool = True, seconds: float = 600) -> None:
    found = read_in_a_process(corpus.folder, engine)
    counts = found["counts"]
    told = {key: value for key, value in found.items() if key != "texts"}
    print(corpus.records, told)
    assert counts["records"] == counts["documents"] + counts["bad"], told
    assert found["bad_places"] == found["bad"] == counts["bad"] == corpus.bad, told
    if all_known:
        assert counts["records"] == corpus.records, told
        assert found["texts"] == dict(corpus.texts), told
    else:
        assert corpus.texts.keys() <= found["texts"].keys(), told
    ordinary = ordinary_mb(corpus.folder.parent, engine)
    print(f"{found['peak_mb'] - ordinary:.0f} MB more than the {ordinary:.0f} of ordinary files")
    assert found["peak_mb"] - ordinary < MAX_MB and found["seconds"] < seconds, told


def test_a_sample(root: Path) -> None:
    check(made_corpus(root / "sample", 0, 5000, 60), "gigatoken")


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_hundred_thousand_records(root: Path, part: int) -> None:
    check(made_corpus(root / f"part-{part}", 1 + part, RECORDS // PARTS, 10 ** (1 + part % 3)), "tokenizers" if part == 0 else "gigatoken")


@pytest.mark.parametrize("name", ["a million marks", "a million deep"])
def test_a_giant(root: Path, name: str) -> None:
    check(giant_corpus(root / name, name, "lines"), "gigatoken")


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ["gigatoken", "tokenizers"])
@pytest.mark.parametrize("name", GIANTS)
def test_every_giant(root: Path, name: str, engine: Engine) -> None:
    if name == "a line of 50 MB" and engine == "tokenizers":
        pytest.skip("words of a million characters take it 80 s each time; with gigatoken they take the same way through our code")
    for kind in ("lines", "rows"):
        check(giant_corpus(root / f"{name} {engine} {kind}", name, kind), engine, seconds=300 if "50 MB" in name else 120)


def test_a_bomb(root: Path) -> None:
    check(bomb(root / "bomb", BOMBS[0]), "gigatoken", seconds=10)


@pytest.mark.faults
@pytest.mark.parametrize("name", BOMBS)
def test_every_bomb(root: Path, name: str) -> None:
    """Of the records before the bomb is given up it is not known how many they are, only that one more is bad."""
    check(bomb(root / name, name), "gigatoken", all_known=name.endswith(("jsonl.zst zeros", "newlines")), seconds=150)
