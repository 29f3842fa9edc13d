"""Claims about `jobs.prepare` and `jobs.train_tokenizer`: one line for what was done, one message for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from jobs import prepare, train_tokenizer
from llm.config import S3Section
from llm.data import builtin
from llm.data.builtin_text import Root
from llm.tokenizer import load_tokenizer

LINE = "The wheel turns the stone, and the stone grinds the corn of the village number {n}. "
CODE = "def grind(corn, stone):\n    return [stone.turn(grain) for grain in corn if grain is not None]\n\n\n"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """60 documents as JSONL.zst, Parquet and plain text, under 10 kB each; a bad record among them."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    texts = [LINE.format(n=n) * 5 for n in range(60)]
    lines = [json.dumps({"text": text, "body": "other"}) for text in texts[:20]] + [
        "{broken",
        json.dumps({"text": "\ud800 half"}),
    ]
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))
    pq.write_table(pa.table({"text": texts[20:40], "body": texts[20:40]}), folder / "b.parquet")
    (folder / "c.txt").write_text("\n".join(texts[40:]))
    return folder


def _train(*args: object) -> int:
    return train_tokenizer.main([str(arg) for arg in args])


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "wordlevel"])
def test_trains_on_every_format_and_saves(kind: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert _train("--input", inputs, "--kind", kind, "--vocab-size", 300, "--out", out) == 0
    tokenizer = load_tokenizer(str(out))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert f"{out}: {kind}, {tokenizer.vocab_size} tokens" in printed
    assert tokenizer.fingerprint[:12] in printed
    assert len(tokenizer.build().encode(LINE).ids) < len(LINE) / 2


def test_the_same_inputs_give_the_same_files(inputs: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert (
            _train(
                "--input",
                inputs / "c.txt",
                "--input",
                inputs / "*.parquet",
                "--vocab-size",
                300,
                "--out",
                tmp_path / name,
            )
            == 0
        )
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_sample_is_spread_over_the_inputs_and_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_tokenizer, "SLICE_BYTES", 100_000)  # a slice a file
    for n in range(40):
        (tmp_path / f"{n:02d}.jsonl").write_text("".join(json.dumps({"text": f"{n:02d} " * 1000}) + "\n" for _ in range(20)))
    texts = list(train_tokenizer.sample_texts([str(tmp_path)], "text", 60_000, S3Section(), []))
    assert 60_000 <= sum(map(len, texts)) <= 60_000 + 3000
    assert len({text[:2] for text in texts}) == 16
    assert len(list(train_tokenizer.sample_texts([str(tmp_path)], "text", 10**9, S3Section(), []))) == 40 * 20


def test_text_field_is_followed(inputs: Path, tmp_path: Path) -> None:
    args = ("--input", inputs / "b.parquet", "--vocab-size", 270, "--out", tmp_path / "out")
    assert _train(*args, "--text-field", "body") == 0
    assert _train(*args, "--text-field", "absent") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "INPUTS", "--vocab-size", "10"], "Nearest legal value: 258"),
        (["--input", "INPUTS/none.jsonl"], "none.jsonl"),
        (["--input", "INPUTS/a.jsonl.zst", "--text-field", "nothing"], "no field 'nothing'"),
    ],
)
def test_errors_are_one_message(args: list[str], message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(*(arg.replace("INPUTS", str(inputs)) for arg in args), "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose standard library is ten small files, and whose working directory is empty."""
    for n in range(10):
        (tmp_path / "lib").mkdir(exist_ok=True)
        (tmp_path / "lib" / f"mill_{n}.py").write_text(f"# File {n}\n" + CODE * 9)
    monkeypatch.setattr(builtin, "default_roots", lambda: [Root(tmp_path / "lib", "stdlib")])
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("small_machine")
def test_prepare_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["--builtin"]) == 0
    assert (tmp_path / "runs/cache/builtin/manifest.json").is_file()
    first = capsys.readouterr().out
    assert first.startswith("runs/cache/builtin: 10 documents, 0.0 MB of text, written in ")
    assert prepare.main(["--builtin"]) == 0
    assert capsys.readouterr().out == "runs/cache/builtin: 10 documents, 0.0 MB of text, already there\n"


@pytest.mark.usefixtures("small_machine")
def test_prepare_leaves_other_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["--builtin", "--out", str(tmp_path / "lib")]) == 2
    assert "left alone" in capsys.readouterr().err
    assert len(list((tmp_path / "lib").iterdir())) == 10


@pytest.mark.usefixtures("small_machine")
def test_builtin_is_an_input(tmp_path: Path) -> None:
    assert _train("--input", "builtin", "--vocab-size", 280, "--out", "tok") == 0
    assert load_tokenizer(str(tmp_path / "tok")).vocab_size == 280


@pytest.mark.parametrize("module", ["jobs.prepare", "jobs.train_tokenizer"])
def test_entry_points_explain_themselves(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert "--out DIR" in done.stdout
