"""Reading through a connection that fails: the same records, or an error that names the object; never fewer records."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llm import retry, storage
from llm.config import CleanSection, S3Section, SourceSection
from llm.data import cache as token_cache
from llm.data import records as reading
from llm.data.cache import TokenCache
from llm.data.exact_file import ExactFile
from llm.data.order import CorpusPlan
from llm.data.records import BadRecord, Document, read_slice
from llm.data.slices import plan_slices
from llm.data.sources import list_files
from llm.data.window import Recipe
from llm.errors import DataError, StorageError
from llm.tokenizer import load_tokenizer
from tests.fuzz_corpus import small_tokenizer
from tests.s3_proxy import FAULTS, Proxy, start_s3_proxy
from tests.s3_server import S3Server

S3 = S3Section(connect_timeout_s=3, request_timeout_s=1)
NAMES = ("plain.jsonl", "packed.jsonl.zst", "rows.parquet", "text.txt")
RATE = 0.2


@pytest.fixture(scope="module")
def files(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faulty")
    rows = [random.Random(i).randbytes(150).hex() + f" é {i}" for i in range(1500)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    (folder / "plain.jsonl").write_bytes(lines)
    (folder / "packed.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "text.txt").write_text("\n".join(rows))
    pq.write_table(pa.table({"text": rows}), folder / "rows.parquet", row_group_size=250)
    client = s3_server.client()
    client.create_bucket(Bucket="faulty")
    for path in folder.iterdir():
        client.put_object(Bucket="faulty", Key=path.name, Body=path.read_bytes())
    return folder


@pytest.fixture
def proxy(s3_env: S3Server, files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """In front of the server, as the environment's endpoint. Reads are short and waits are too, so that there are many of both."""
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 20_000)
    monkeypatch.setattr(reading, "_TAIL_BYTES", 500)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "_jitter", random.Random(1))
    with start_s3_proxy(s3_env.endpoint, seed=1, stall_s=0.3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def read(uri: str, slice_bytes: int = 60_000) -> list[Document | BadRecord]:
    found = list_files(SourceSection(name="docs", uri=uri, weight=None), S3)
    return [record for piece in plan_slices("docs", found, slice_bytes) for record in read_slice(piece, "text", S3)]


def outcome(records: list[Document | BadRecord]) -> list[tuple[int, str]]:
    return [(record.position, record.text if isinstance(record, Document) else record.reason) for record in records]


def test_a_fifth_of_the_requests_failing_changes_no_record(proxy: Proxy, files: Path) -> None:
    for name in NAMES:
        wanted = outcome(read(str(files / name)))
        plan = plan_slices("docs", list_files(SourceSection(name="docs", uri=f"s3://faulty/{name}", weight=None), S3), 60_000)
        proxy.rate = RATE
        found = outcome([record for piece in plan for record in read_slice(piece, "text", S3)])
        proxy.rate = 0
        assert found == wanted and len(found) > 5, name
    for name in NAMES:
        proxy.rate = RATE
        assert storage.read_bytes(f"s3://faulty/{name}", S3) == (files / name).read_bytes()
        proxy.rate = 0
    assert all(proxy.seen[fault] >= 5 for fault in FAULTS), proxy.seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["short", "503", "reset"])
def test_a_connection_that_stays_broken_is_an_error_that_names_the_object(proxy: Proxy, name: str, fault: str) -> None:
    plan = plan_slices("docs", list_files(SourceSection(name="docs", uri=f"s3://faulty/{name}", weight=None), S3), 60_000)
    proxy.faults = (fault,)
    found: list[Document | BadRecord] = []
    started_s = time.monotonic()
    with pytest.raises(StorageError, match=rf"s3://faulty/{name}: cannot read") as error:
        for record in read_slice(plan[len(plan) - 1], "text", S3):
            found.append(record)
            proxy.rate = 1  # from the first record on
        proxy.rate = 1
        found += read_slice(plan[0], "text", S3)  # where the last slice was held in memory by then
    assert time.monotonic() - started_s < 10
    assert not any(isinstance(record, BadRecord) for record in found)
    assert fault != "short" or name == "rows.parquet" or " bytes at " in str(error.value), str(error.value)


def exact(name: str, size_bytes: int | None = None) -> ExactFile:
    file = list_files(SourceSection(name="docs", uri=f"s3://faulty/{name}", weight=None), S3)[0]
    return ExactFile(file.uri, size_bytes or file.size_bytes, file.version, S3)


def test_an_open_file_survives_and_then_names_the_place(proxy: Proxy, files: Path) -> None:
    data = (files / "plain.jsonl").read_bytes()
    with exact("plain.jsonl") as stream:
        proxy.rate, proxy.faults = 1, ("short",)
        stream.seek(1000)
        with pytest.raises(StorageError, match=rf"plain.jsonl: cannot read 5000 bytes at 1000 of {len(data)}: ") as error:
            stream.read(5000)
        assert "IncompleteRead" in str(error.value), str(error.value)
        proxy.rate = 0
        assert (stream.tell(), stream.read(5000)) == (1000, data[1000:6000])
        assert stream.seek(-10, 2) == len(data) - 10 and stream.read(99) == data[-10:] and stream.read(1) == b""


def test_a_stall_longer_than_the_time_out_is_read_again(proxy: Proxy, files: Path) -> None:
    data = (files / "plain.jsonl").read_bytes()
    proxy.stall_s = 60

    def calm() -> None:
        while not proxy.seen["stall"]:
            time.sleep(0.01)
        proxy.rate = 0

    with exact("plain.jsonl") as stream:
        proxy.rate, proxy.faults = 1, ("stall",)
        threading.Thread(target=calm, daemon=True).start()
        started_s = time.monotonic()
        assert stream.read() == data and 0.9 < time.monotonic() - started_s < 10
    assert proxy.seen["stall"] == 1


@pytest.mark.usefixtures("proxy")
def test_what_cannot_pass_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 30.0)
    started_s = time.monotonic()
    with pytest.raises(StorageError, match="no such object"):
        ExactFile("s3://faulty/nothing.txt", 1, "0" * 32, S3).read()
    assert time.monotonic() - started_s < 5


def test_the_token_cache_reads_as_patiently(
    s3_server: S3Server, proxy: Proxy, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    recipe = Recipe(cast(CorpusPlan, None), tokenizer, "tokenizers", 63, CleanSection(), {"docs": "text"}, S3)
    listed = list_files(SourceSection(name="docs", uri=str(files / "plain.jsonl"), weight=None), S3)
    pieces = [plan_slices("docs", listed, 60_000)[i] for i in range(6)]
    direct = S3Section(endpoint_url=s3_server.endpoint)  # the proxy knows nothing of uploads in chunks
    cache = TokenCache("s3://faulty/tokens", direct, 1 << 30)
    made = [cache.slice(recipe, piece) for piece in pieces]
    cache = TokenCache(cache.uri, S3, 1 << 30)
    monkeypatch.setattr(token_cache, "make_slice", never)
    proxy.rate = 0.4
    for piece, expected in zip(pieces * 3, made * 3, strict=True):
        np.testing.assert_array_equal(cache.slice(recipe, piece).rows.ids, expected.rows.ids)
    assert proxy.seen["short"] + proxy.seen["stall"] >= 5, proxy.seen
    proxy.rate, proxy.faults = 1, ("short",)
    with pytest.raises(StorageError, match=r"s3://faulty/tokens/.*\.arrow: cannot read"):
        cache.slice(recipe, pieces[0])


def never(*args: object) -> None:
    raise AssertionError("a slice that is in the cache was packed again")


class Cut:
    """pyarrow's file, of whose reads only the first bytes come."""

    def __init__(self, most: int) -> None:
        self._most = most

    def read_at(self, size: int, offset: int) -> bytes:
        return bytes(i % 251 for i in range(offset, offset + min(size, self._most)))

    def close(self) -> None:
        pass


def test_a_short_read_without_an_error_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(1000))
    stream = ExactFile(str(path), 1000, str(path.stat().st_mtime_ns), S3)
    for most, whole in ((300, True), (100, False), (0, False)):
        monkeypatch.setattr(stream, "_opened", lambda most=most: Cut(most))
        stream.seek(10)
        if whole:
            assert stream.read() == bytes(i % 251 for i in range(10, 1000))
        else:
            with pytest.raises(StorageError, match=rf"a.bin: cannot read 990 bytes at 10 of 1000: only {6 * most} bytes came"):
                stream.read()


@pytest.mark.parametrize("name", ["plain.jsonl", "rows.parquet"])
def test_a_local_file_that_shrinks_while_it_is_read(files: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 20_000)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    path = tmp_path / name
    path.write_bytes((files / name).read_bytes())
    listed = list_files(SourceSection(name="docs", uri=str(path), weight=None), S3)
    reader = read_slice(plan_slices("docs", listed, 10**9)[0], "text", S3)

    def shrunk(*args: Any, **keys: Any) -> pq.ParquetFile:
        os.truncate(path, listed[0].size_bytes // 2)
        return parquet_file(*args, **keys)

    parquet_file = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", shrunk)
    if name == "plain.jsonl":
        assert isinstance(next(reader), Document)
        os.truncate(path, listed[0].size_bytes // 2)
    with pytest.raises(DataError, match="changed since the run listed it"):
        list(reader)
