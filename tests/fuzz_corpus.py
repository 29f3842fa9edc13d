"""Corpora of malformed records whose count is known, and the process that reads one: `python -m tests.fuzz_corpus FOLDER`.

The process prints what `make_slice` counted over all slices, and its peak of memory over what it had after its imports.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import zstandard

from llm.config import CleanSection, S3Section, SourceSection
from llm.data.clean import Cleaner
from llm.data.encode import Encoder, Engine
from llm.data.order import CorpusPlan
from llm.data.pack import DOCUMENT, OFFSET
from llm.data.records import MAX_VALUE_BYTES
from llm.data.slices import plan_slices
from llm.data.sources import list_files
from llm.data.window import Packed, Recipe, make_slice
from llm.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

SLICE_BYTES = 1 << 18
ALPHABET = 'abcdefghij     klmnopqrst\u00e9\u00df\u03b1\u4e2d\U0001f600\u200d.,;"\\{}[]\t'
BAD = None  # the text of a record that must be quarantined

Made = tuple[bytes, str | None]  # a JSON line without its end, and the text that it holds


def words(rng: random.Random) -> str:
    """A text that no other record has."""
    return f"w{rng.getrandbits(60):x} " + "".join(rng.choices(ALPHABET, k=rng.randrange(60)))


def line(text: Any, **more: Any) -> bytes:
    return json.dumps({"text": text} | more, ensure_ascii=False).encode("utf-8", "surrogatepass")


def good(rng: random.Random) -> Made:
    text = words(rng)
    return line(text), text


def damaged_bytes(rng: random.Random) -> Made:
    data = line(words(rng))
    at = rng.randrange(len(data))
    return data[:at] + rng.choice([b"\xc0", b"\xfe", b"\xff"]) + data[at:], BAD  # bytes that UTF-8 never holds


def cut_short(rng: random.Random) -> Made:
    data = line(words(rng))
    return data[: rng.randrange(1, len(data))], BAD


def wrong_type(rng: random.Random) -> Made:
    return line(rng.choice([None, 7, -0.5, True, [], ["text"], {}, {"text": "a"}])), BAD


def no_object(rng: random.Random) -> Made:
    return rng.choice(
        [b"null", b"[]", b'"text"', b"17", b"NaN", b"-Infinity", b"[NaN]", b'{"txt": "a"}', b"{}", b"{]", b"\0", b"\xef\xbb\xbf"]
    ), BAD


def nested(rng: random.Random) -> Made:
    depth = rng.choice([3000, 20_000])
    return b'{"text": ' + rng.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth + b"}"]), BAD


def huge_number(rng: random.Random) -> Made:
    return b'{"text": "x", "id": 1' + b"0" * 10_000 + b"}", BAD


def large_number(rng: random.Random) -> Made:
    text = words(rng)
    return line(text, id=10**3999), text


def same_key_twice(rng: random.Random) -> Made:
    text = words(rng)
    return b'{"text": "the last one counts", ' + line(text)[1:], text


def not_a_number(rng: random.Random) -> Made:
    text = words(rng)
    return line(text, score=float(rng.choice(["nan", "inf", "-inf"]))), text


def surrogates(rng: random.Random) -> Made:
    text = words(rng) + rng.choice(["\ud800", "\udfff\ud800", "\udc80"]) + words(rng)
    return json.dumps({"text": text}).encode(), text


def raw_surrogate(rng: random.Random) -> Made:
    return line(words(rng) + "\ud83d"), BAD


def nul(rng: random.Random) -> Made:
    text = words(rng) + "\0\0" + words(rng)
    return json.dumps({"text": text}).encode(), text


def raw_nul(rng: random.Random) -> Made:
    return b'{"text": "a\0b"}', BAD


def byte_order_mark(rng: random.Random) -> Made:
    data, text = good(rng)
    return b"\xef\xbb\xbf" + data, text


def controls(rng: random.Random) -> Made:
    text = "".join(rng.choices("\x00\x01\x07\x1b\x7f\x85\u200b\ufeff\ufffe", k=30))
    return json.dumps({"text": text}).encode(), text


def empty(rng: random.Random) -> Made:
    text = rng.choice(["", " ", "\n\n", "\t \r\n"])
    return line(text), text


def book(lines: int) -> str:
    rng = random.Random(0)
    return "".join(f"line {rng.getrandbits(40):x} of the old caf\u00e9\n" for _ in range(lines))


def marks(rng: random.Random) -> Made:
    text = words(rng) + "e" + "\u0301\u0323" * rng.randrange(200)
    return line(text), text


def noise(rng: random.Random) -> Made:
    return b"\xff" + rng.randbytes(rng.randrange(300)).replace(b"\n", b""), BAD


def many_keys(rng: random.Random) -> Made:
    text = words(rng)
    return line(text, **{f"k{i}": i for i in range(rng.choice([1000, 5000]))}), text


def mistaken(rng: random.Random) -> Made:
    text = words(rng) + "na\u00c3\u00afve caf\u00c3\u00a9 \u00e2\u20ac\u2122 \x81\x1a"
    return line(text), text


CHEAP: tuple[Callable[[random.Random], Made], ...] = (
    *[good] * 6, damaged_bytes, damaged_bytes, cut_short, cut_short, wrong_type, wrong_type, no_object, no_object, same_key_twice,
    not_a_number, surrogates, raw_surrogate, nul, raw_nul, byte_order_mark, controls, empty, marks, noise, mistaken, large_number,
)  # fmt: skip
DEAR = (nested, huge_number, many_keys)
# Each with its line, its text; once a corpus.
GIANTS: dict[str, Callable[[], Made]] = {
    "a line of 50 MB": lambda: (line(long := random.Random(0).randbytes(25_000_000).hex()), long),
    "a book of 50 MB": lambda: (line(long := "A \U0001f600.\n" + book(1_400_000), id=7), long),
    "a value of 16 MB": lambda: (line("v" + "word " * 3_300_000), "v" + ("word " * 3_300_000).rstrip()),
    "a line of 60 MB": lambda: (line(random.Random(0).randbytes(30_000_000).hex()), BAD),
    "long and broken": lambda: (line("word " * 5_000_000)[:-1], BAD),
    "long and not UTF-8": lambda: (line("word " * 5_000_000)[:-9] + b"\xff\"}", BAD),
    "long beside the text": lambda: (line("short", other="word " * 5_000_000), "short"),
    "too much beside the text": lambda: (line("short", other=["word " * 100] * 10_000), BAD),
    "the longest line": lambda: (line("longest " + "word " * 800_000 + "\U0001f600"), "longest " + "word " * 800_000 + "\U0001f600"),
    "short lines": lambda: (line(long := "lines\n" + "\u4e2da\n" * 650_000), long),
    "one word": lambda: (line("\u4e2d" * 1_390_000), "\u4e2d" * 1_390_000),
    "blanks": lambda: (line("blank" + " " * 4_000_000 + "x"), "blank" + " " * 4_000_000 + "x"),
    "mistaken": lambda: (line("mist" + "\u00c3\u00a9" * 1_000_000), "mist" + "\u00c3\u00a9" * 1_000_000),
    "a million deep": lambda: (b'{"text": ' + b"[" * 999_000, BAD),
    "a million lists": lambda: (b'{"text": "x", "a": [' + b"[[]]," * 600_000 + b"0]}", BAD),
    "lists": lambda: (b'{"text": "lists", "a": [' + b"[[]]," * 490_000 + b"0]}", "lists"),
    "strings": lambda: (b'{"text": "strings", "a": [' + b'"ab",' * 800_000 + b"0]}", "strings"),
    "keys": lambda: (line("keys", **{f"k{i}": i for i in range(100_000)}), "keys"),
    "a million marks": lambda: (line("marks" + "\u0301\u0323" * 500_000), "marks" + "\u0301\u0323" * 500_000),
    "controls": lambda: (json.dumps({"text": "\x01" * 690_000}).encode(), "\x01" * 690_000),
}  # fmt: skip


class Corpus:
    """Writes files into `folder`; `records` is how many they hold, `texts` the text of each that is good, as it must come out."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.records, self.bad = 0, 0
        self.texts: Counter[str] = Counter()  # by digest
        self._cleaner = Cleaner(CleanSection())
        self._files = 0
        folder.mkdir(parents=True)

    def add_lines(self, suffix: str, made: list[Made]) -> None:
        between = self.rng.choice([b"\n", b"\r\n", b"\n\n", b"\n \t\n"])
        data = between.join(data for data, _ in made) + self.rng.choice([b"", b"\n", b"\r\n"])
        self.add(suffix, packed(data, suffix, self.rng), made)

    def add_text(self, suffix: str, data: bytes) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = BAD
        self.add(suffix, packed(data, suffix, self.rng), [(data, text)])

    def add_rows(self, made: list[Made]) -> None:
        """A Parquet file of the texts; in the place of a bad one null or bytes that are not UTF-8. One that is too long is bad."""
        rows = [self.rng.choice([None, data + b"\xff"]) if text is None else text.encode("utf-8", "replace") for data, text in made]
        sink = io.BytesIO()
        pq.write_table(pa.table({"text": pa.array(rows, pa.binary())}), sink, row_group_size=self.rng.choice([10, 100, 1000]))
        readable = [text is not BAD and len(row or b"") <= MAX_VALUE_BYTES for row, (_, text) in zip(rows, made, strict=True)]
        held = [(b"", (row or b"").decode() if good else BAD) for row, good in zip(rows, readable, strict=True)]
        self.add(".parquet", sink.getvalue(), held)

    def add_damaged(self, made: list[Made]) -> None:
        """A compressed file that ends at a random place: what stands before, and one bad record."""
        suffix = self.rng.choice([".gz", ".zst"])
        data = b"".join(each + b"\n" for each, _ in made)
        whole = gzip.compress(data, 1) if suffix == ".gz" else zstandard.compress(data)
        kept = whole[: self.rng.randrange(1, len(whole) - 8)]
        unpacker: Any = zlib.decompressobj(wbits=31) if suffix == ".gz" else zstandard.ZstdDecompressor().decompressobj()
        before = unpacker.decompress(kept).count(b"\n")
        self.add(f".jsonl{suffix}", kept, [*made[:before], (b"", BAD)])

    def add(self, suffix: str, data: bytes, made: list[Made]) -> None:
        """A file of these bytes, which hold these records."""
        (self.folder / f"{self._files:05}{suffix}").write_bytes(data)
        self._files += 1
        self.count(made)

    def count(self, made: list[Made]) -> None:
        self.records += len(made)
        for _, text in made:
            self.bad += text is BAD
            if text is not None and (cleaned := self._cleaner.clean(text)):
                self.texts[digest(cleaned)] += 1


def packed(data: bytes, suffix: str, rng: random.Random) -> bytes:
    cut = rng.randrange(len(data) + 1)
    if suffix.endswith(".gz"):
        return gzip.compress(data[:cut], 1) + gzip.compress(data[cut:], 1)
    return zstandard.compress(data[:cut]) + zstandard.compress(data[cut:]) if suffix.endswith(".zst") else data


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def made_corpus(folder: Path, seed: int, records: int, per_file: int) -> Corpus:
    """At least `records` records in files of all formats: about `per_file` in each, one in a text file."""
    corpus = Corpus(folder, seed)
    rng = corpus.rng
    while corpus.records < records:
        kind = rng.choices(["lines", "text", "rows", "damaged"], [60, 10, 20, 10])[0]
        made = [(rng.choice(DEAR) if rng.random() < 0.005 else rng.choice(CHEAP))(rng) for _ in range(rng.randrange(1, 2 * per_file))]
        if kind == "lines":
            corpus.add_lines(rng.choice([".jsonl", ".jsonl.gz", ".jsonl.zst"]), made)
        elif kind == "rows":
            corpus.add_rows(made)
        elif kind == "damaged":
            corpus.add_damaged(made)
        else:
            for data, _ in made[:5]:
                corpus.add_text(rng.choice([".txt", ".txt.gz", ".txt.zst"]), data)
    return corpus


def giant_corpus(folder: Path, name: str, kind: Literal["lines", "rows"]) -> Corpus:
    """The giant between two small records: in three files of lines, plain and compressed, or as a Parquet row."""
    corpus = Corpus(folder, 0)
    made = [good(corpus.rng), GIANTS[name](), good(corpus.rng)]
    if kind == "rows":
        corpus.add_rows(made)
        return corpus
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
        data = b"".join(each + b"\n" for each, _ in made)
        corpus.add(suffix, packed(data, suffix, corpus.rng), made)
    return corpus


def bomb(folder: Path, name: str) -> Corpus:
    """A compressed file of 4 GB: a good record, then the bomb, which is 64 times the same frame of 64 MB."""
    suffix, kind = name.split()
    unit = {"zeros": b"\0", "newlines": b"\n", "records": b'{"text": "one of very many"}\n', "lines": b"a line of text\n"}[kind]
    pack: Callable[[bytes], bytes] = (lambda data: gzip.compress(data, 6)) if suffix.endswith(".gz") else zstandard.compress
    corpus = Corpus(folder, 0)
    data, text = good(corpus.rng)
    frame = pack(unit * ((64 << 20) // len(unit)))
    held: list[Made] = [(b"", BAD)] if suffix.startswith(".txt") else [(data, text), (b"", BAD)]
    corpus.add(suffix, pack(data + b"\n") + frame * 64, held)
    return corpus


def read_in_a_process(folder: Path, engine: Engine) -> dict[str, Any]:
    """What `main` prints of the corpus in `folder`."""
    command = [sys.executable, "-m", "tests.fuzz_corpus", str(folder), engine]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


def main(folder: str, engine: Engine) -> None:
    tokenizer = load_tokenizer(str(Path(folder).parent / "tokenizer"))
    recipe = Recipe(cast(CorpusPlan, None), tokenizer, engine, 255, CleanSection(), {"docs": "text"}, S3Section())
    built = tokenizer.build()
    Encoder(tokenizer, engine).encode(["what it imports is part of the baseline, like the imports above"])

    base_mb = memory_mb("VmRSS")
    pieces = plan_slices("docs", list_files(SourceSection(name="docs", uri=folder, weight=None), S3Section()), SLICE_BYTES)
    counts: Counter[str] = Counter()
    bad: list[tuple[str, int]] = []
    texts: Counter[str] = Counter()
    seconds, slowest = 0.0, (0.0, "")
    for piece in pieces:
        started_s = time.monotonic()
        found = make_slice(recipe, piece)
        took_s = time.monotonic() - started_s
        seconds += took_s
        slowest = max(slowest, (took_s, piece.files[0].uri))
        counts.update(found.counts)
        bad += [(record.uri, record.position) for record in found.bad]
    peak_mb = memory_mb("VmHWM") - base_mb
    for piece in pieces:  # once more, because decoding takes memory that is not the pipeline's
        texts.update(digest(text) for text in decoded(make_slice(recipe, piece), built))
    outcome = {"counts": counts, "slices": len(pieces), "bad": len(bad), "bad_places": len(set(bad)), "texts": texts}
    print(json.dumps(outcome | {"peak_mb": peak_mb, "seconds": seconds, "slowest": slowest}))


def decoded(found: Packed, built: tokenizers.Tokenizer) -> Iterator[str]:
    """The text of each document, from its pieces in the rows."""
    order = found.rows.pieces[np.lexsort((found.rows.pieces[:, OFFSET], found.rows.pieces[:, DOCUMENT]))]
    assert len(np.unique(order[:, DOCUMENT])) == len(found.documents)
    for pieces in np.split(order, np.flatnonzero(np.diff(order[:, DOCUMENT])) + 1) if len(order) else []:
        ids = np.concatenate([found.rows.ids[row, column : column + length] for row, column, _, _, length in pieces])
        yield built.decode(ids[:-1].tolist(), skip_special_tokens=False)


def memory_mb(name: str) -> float:
    """VmRSS or VmHWM of this process. Not ru_maxrss, which begins with the peak of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def small_tokenizer(folder: Path) -> None:
    rng = random.Random(0)
    save_tokenizer(train_tokenizer((words(rng) for _ in range(3000)), vocab_size=512), folder)


if __name__ == "__main__":
    main(sys.argv[1], cast(Engine, sys.argv[2]))
