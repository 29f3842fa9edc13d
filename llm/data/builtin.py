"""The embedded corpus and its tokenizer: 24 MB of real text from this Python installation, made once, in seconds.

Both are folders that are complete or absent. They are written beside their place under a temporary name and renamed, so
a killed process leaves nothing half-made and two processes at once end with one copy. What is there stays as it is when
packages are installed or upgraded: a run that goes on must find the data it began with. Delete the folder to collect it
anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from llm.data.builtin_text import Root, Text, collect, default_roots
from llm.errors import DataError, StorageError
from llm.tokenizer import save_tokenizer, train_tokenizer

CORPUS_FOLDER = Path("runs/cache/builtin")
TOKENIZER_FOLDER = Path("runs/cache/builtin-tokenizer")
MAX_TEXT_BYTES = 24_000_000
SHARD_TEXT_BYTES = 500_000  # one JSONL shard, or one row group of a Parquet file
PARQUET_EVERY = 6  # one shard in six is a row group, so that every run reads both formats
ROW_GROUPS_PER_FILE = 4
SAMPLE_TEXT_BYTES = 4_000_000  # enough for 4096 tokens in 2 s of CPU; training on all 24 MB takes five times as long
MANIFEST = "manifest.json"
_VERSION = 1  # raise it when other code would write other files
_STALE_S = 3600.0  # a temporary folder that old belongs to a process that was killed


@dataclass(frozen=True)
class BuiltinCorpus:
    """Where the corpus is. `text_bytes` counts UTF-8 before compression, `elapsed_s` this call's wall time."""

    folder: Path
    num_documents: int
    text_bytes: int
    elapsed_s: float
    cached: bool

    @property
    def uri(self) -> str:
        """The glob that names the shards, and not the manifest beside them."""
        return f"{self.folder}/docs-*"


def prepare_builtin(
    folder: Path = CORPUS_FOLDER, *, max_text_bytes: int = MAX_TEXT_BYTES, roots: Sequence[Root] | None = None
) -> BuiltinCorpus:
    """The corpus in `folder`, written first if it is not there.

    `docs-*.jsonl.zst` hold one record a line, `docs-*.parquet` the same columns: text, path, kind (doc, docstring,
    code), package (whose licence applies). Raises DataError when `folder` holds other files, which are never touched,
    or when this machine has no text at all; StorageError when it cannot be written.
    """
    began_at_s = time.monotonic()
    key = {"what": "headrace builtin corpus", "version": _VERSION, "max_text_bytes": max_text_bytes}

    def write(into: Path) -> dict[str, Any]:
        texts = collect(default_roots() if roots is None else roots, max_text_bytes)
        if not texts:
            raise DataError(
                "The builtin corpus found no text: neither the standard library nor site-packages can be read here.\n"
                "  Name your own files instead: data.sources=[{name: ..., uri: ...}]"
            )
        _write_shards(texts, into)
        return {
            "num_documents": len(texts),
            "text_bytes": sum(text.num_bytes for text in texts),
            "kind_bytes": {k: sum(t.num_bytes for t in texts if t.kind == k) for k in ("doc", "docstring", "code")},
            "num_packages": len({text.package for text in texts}),
            "sha256": hashlib.sha256(b"".join(text.digest for text in texts)).hexdigest(),
        }

    manifest, cached = _made_once(folder, key, write)
    elapsed_s = time.monotonic() - began_at_s
    return BuiltinCorpus(folder, manifest["num_documents"], manifest["text_bytes"], elapsed_s, cached)


def prepare_builtin_tokenizer(corpus_folder: Path = CORPUS_FOLDER, folder: Path = TOKENIZER_FOLDER, vocab_size: int = 4096) -> Path:
    """`folder`, holding a byte-level BPE tokenizer of the corpus in `corpus_folder`; trained on a sample if not there.

    It is trained anew when the corpus or `vocab_size` is not the one it was trained on. Raises DataError when
    `corpus_folder` holds no corpus, or `folder` holds other files.
    """
    corpus = _manifest(corpus_folder)
    if corpus is None:
        raise DataError(
            f"{corpus_folder} holds no builtin corpus to train a tokenizer on.\n  Write it first: python -m jobs.prepare --builtin"
        )
    key = {
        "what": "headrace builtin tokenizer",
        "version": _VERSION,
        "corpus_sha256": corpus["sha256"],
        "vocab_size": vocab_size,
    }

    def write(into: Path) -> dict[str, Any]:
        tokenizer = train_tokenizer(_sample(corpus_folder, SAMPLE_TEXT_BYTES), "bpe", vocab_size)
        save_tokenizer(tokenizer, into)
        return {"fingerprint": tokenizer.fingerprint}

    _made_once(folder, key, write)
    return folder


def _write_shards(texts: list[Text], into: Path) -> None:
    shards = list(_shards(texts))
    num_groups = len(shards) // PARQUET_EVERY
    compressor = zstandard.ZstdCompressor(level=3)
    for i, shard in enumerate(shards[num_groups:]):
        (into / f"docs-{i:04d}.jsonl.zst").write_bytes(compressor.compress(_lines(shard)))
    for i in range(0, num_groups, ROW_GROUPS_PER_FILE):
        groups = shards[i : min(i + ROW_GROUPS_PER_FILE, num_groups)]
        _write_parquet(groups, into / f"docs-{i // ROW_GROUPS_PER_FILE:04d}.parquet")


def _write_parquet(groups: list[list[Text]], path: Path) -> None:
    import pyarrow as pa  # here, because a corpus that is already there needs none of it
    import pyarrow.json
    import pyarrow.parquet

    schema = pa.schema([(name, pa.string()) for name in ("text", "path", "kind", "package")])
    parse = pyarrow.json.ParseOptions(explicit_schema=schema)
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as file:
        for group in groups:
            lines = _lines(group)
            read = pyarrow.json.ReadOptions(block_size=len(lines) + 1, use_threads=False)
            # Through the JSON reader, because Table.from_pylist imports pandas: half a second.
            table = pyarrow.json.read_json(pa.BufferReader(lines), read, parse)
            file.write_table(table, row_group_size=len(group))


def _lines(texts: Iterable[Text]) -> bytes:
    records = ({"text": text.text, "path": text.path, "kind": text.kind, "package": text.package} for text in texts)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _shards(texts: Iterable[Text]) -> Iterator[list[Text]]:
    shard: list[Text] = []
    num_bytes = 0
    for text in texts:
        shard.append(text)
        num_bytes += text.num_bytes
        if num_bytes >= SHARD_TEXT_BYTES:
            yield shard
            shard, num_bytes = [], 0
    if shard:
        yield shard


def _sample(corpus_folder: Path, max_text_bytes: int) -> Iterator[str]:
    """The first documents of every JSONL shard, some `max_text_bytes` in total; every shard is a mixture of all."""
    shards = sorted(corpus_folder.glob("docs-*.jsonl.zst"))
    for shard in shards:
        left = max_text_bytes // len(shards)
        for line in zstandard.ZstdDecompressor().decompress(shard.read_bytes()).splitlines():
            if left <= 0:
                break
            text = json.loads(line)["text"][:left]
            left -= len(text)
            yield text


def _made_once(folder: Path, key: dict[str, Any], write: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """The manifest of what is in `folder`, and whether it was there; `write` fills a new folder, returns its counts.

    What an older version of Headrace wrote there is replaced; anything else that is in the way is an error.
    """
    folder = folder.resolve()  # a link to another disk is followed, not replaced
    present = _present(folder, key)
    if present is not None:
        return present, True
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            made = scratch / "made"
            made.mkdir()
            counts = write(made)
            files = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
            manifest = {**key, **counts, "files": files}
            (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            return _publish(made, folder, key, manifest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}. Give another: run.storage, or --out of jobs.prepare.") from error


def _publish(made: Path, folder: Path, key: dict[str, Any], manifest: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    for attempt in range(3):
        try:
            os.rename(made, folder)  # noqa: PTH104  Path.rename is the same call, under a name that hides that it is atomic
            return manifest, False
        except OSError:
            present = _present(folder, key)  # another process was quicker, or an older version is in the way
            if present is not None:
                return present, True
            if not folder.is_dir() or attempt == 2:
                raise
            folder.rename(made.parent / f"replaced-{attempt}")
    raise AssertionError("unreachable")


def _present(folder: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a complete folder made for `key`; None for none or an outdated one. DataError for others."""
    if not folder.exists():
        return None
    manifest = _manifest(folder)
    if manifest is None or manifest.get("what") != key["what"]:
        if folder.is_dir() and not any(folder.iterdir()):
            return None
        raise DataError(
            f"{folder} holds files that are not the {key['what'].removeprefix('headrace ')}; they are left alone.\n"
            "  Give a folder that is empty or does not exist yet, with --out."
        )
    complete = all(_size(folder / name) == size for name, size in manifest["files"].items())
    return manifest if complete and all(manifest.get(name) == value for name, value in key.items()) else None


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "what" in manifest and "files" in manifest else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _remove_stale(folder: Path) -> None:
    for scratch in folder.parent.glob(f".{folder.name}.*.tmp"):
        try:
            if time.time() - scratch.stat().st_mtime > _STALE_S:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError:
            continue  # its process has just removed it
