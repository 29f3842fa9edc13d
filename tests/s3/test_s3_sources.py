"""Sources and storage on a real S3 server: the same documents as from a disk, and errors that a person can act on."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llm import storage
from llm.config import S3Section, SourceSection
from llm.data import exact_file, unpack
from llm.data import records as reading
from llm.data.exact_file import ExactFile
from llm.data.records import BadRecord, Document, read_slice
from llm.data.slices import plan_slices
from llm.data.sources import list_files
from llm.errors import DataError, StorageError
from llm.file_listing import find_files
from llm.s3 import s3_once
from tests.s3_server import S3Server

S3 = S3Section(connect_timeout_s=3, request_timeout_s=10)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rows = [f"document {i} " + "word é " * (i % 40) for i in range(600)]
    lines = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\r\n" for row in rows).encode()
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "plain.jsonl").write_bytes(lines)
    (folder / "deep" / "packed.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "deep" / "cut.jsonl.zst").write_bytes(zstandard.compress(lines)[:-300])
    (folder / "deep" / "er" / "text ü+%.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
    (folder / "deep" / ".hidden.txt").write_text("no")
    (folder / "deep" / "empty.txt").touch()
    pq.write_table(pa.table({"text": rows, "id": range(600)}), folder / "rows.parquet", row_group_size=100)
    return folder


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, local: Path) -> str:
    client = s3_server.client()
    client.create_bucket(Bucket="corpus")
    for path in local.rglob("*"):
        if path.is_file():
            client.put_object(Bucket="corpus", Key=f"v1/{path.relative_to(local).as_posix()}", Body=path.read_bytes())
    return "s3://corpus/v1"


def read(uri: str, slice_bytes: int = 5000) -> list[tuple[str, int, str]]:
    """(file name, position, text or what is wrong) of every record of a source, slice by slice."""
    files = list_files(SourceSection(name="docs", uri=uri, weight=None), S3)
    found: list[Document | BadRecord] = []
    for piece in plan_slices("docs", files, slice_bytes):
        found += read_slice(piece, "text", S3)
    return [(each.uri.rpartition("/")[2], each.position, each.text if isinstance(each, Document) else each.reason) for each in found]


@pytest.mark.usefixtures("s3_env")
@pytest.mark.parametrize(
    "pattern",
    ["", "/plain.jsonl", "/*.jsonl", "/**/*.jsonl.zst", "/deep/**", "/*/*/t*.txt", "/r?ws.par[q]uet", "/de*/**"],
)
def test_s3_reads_as_the_disk_does(bucket: str, local: Path, pattern: str) -> None:
    found = read(bucket + pattern)
    assert found == read(str(local) + pattern) and len(found) > 3


@pytest.mark.usefixtures("s3_env")
def test_versions_are_etags(bucket: str) -> None:
    source = SourceSection(name="docs", uri=bucket + "/plain.jsonl", weight=None)
    first = list_files(source, S3)[0]
    assert first.uri == "s3://corpus/v1/plain.jsonl" and first.path == "corpus/v1/plain.jsonl"
    assert len(first.version) == 32 and list_files(source, S3)[0] == first


@pytest.mark.usefixtures("s3_env")
def test_bytes_round_trip(bucket: str) -> None:
    uri = bucket.replace("/v1", "/made/x.bin")
    assert not storage.exists(uri, S3)
    for data in (b"one", b"", b"\0" * 6_000_000):
        storage.write_bytes(uri, data, S3)
        assert storage.read_bytes(uri, S3) == data
    assert storage.exists(uri, S3) and storage.exists(bucket, S3)


@pytest.mark.usefixtures("s3_env")
@pytest.mark.parametrize("name", ["plain.jsonl", "deep/packed.jsonl.zst", "deep/er/text ü+%.txt", "rows.parquet"])
def test_an_object_rewritten_at_equal_size_is_an_error(s3_server: S3Server, bucket: str, local: Path, name: str, monkeypatch) -> None:
    """Before the first read of a slice, and in the middle of one. With the old object put back the run goes on."""
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 2000)
    monkeypatch.setattr(unpack, "UNPACKED_BYTES", 500)
    monkeypatch.setattr(reading, "COMPRESSED_TEXT_BYTES", 500)
    monkeypatch.setattr(reading, "_PARQUET_BATCH_ROWS", 10)
    client, old = s3_server.client(), (local / name).read_bytes()

    def put(data: bytes) -> None:
        client.put_object(Bucket="corpus", Key=f"v2/{name}", Body=data)

    put(old)
    pieces = plan_slices("docs", list_files(SourceSection(name="docs", uri=f"s3://corpus/v2/{name}", weight=None), S3), 5000)
    expected = list(read_slice(pieces[0], "text", S3))
    put(old[:-1] + bytes([old[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"s3://corpus/v2/{re.escape(name)}: changed since the run listed it: its ETag is another"):
        list(read_slice(pieces[0], "text", S3))
    put(old)
    assert list(read_slice(pieces[0], "text", S3)) == expected
    stream = ExactFile(f"s3://corpus/v2/{name}", len(old), pieces[0].files[0].version, S3)
    assert stream.read(1000) == old[:1000]
    put(bytes(len(old)))
    with pytest.raises(DataError, match="changed since the run listed it"):
        stream.read(1000)


@pytest.mark.usefixtures("s3_env")
def test_a_server_that_ignores_the_condition_is_not_believed(bucket: str, local: Path, monkeypatch) -> None:
    file = list_files(SourceSection(name="docs", uri=f"{bucket}/plain.jsonl", weight=None), S3)[0]
    client = s3_once(S3)

    class Deaf:
        def get_object(self, IfMatch: str, **keys: str) -> dict:
            return client.get_object(**keys)

    monkeypatch.setattr(exact_file, "s3_once", lambda s3: Deaf())
    data = (local / "plain.jsonl").read_bytes()
    assert ExactFile(file.uri, file.size_bytes, file.version, S3).read() == data
    with pytest.raises(DataError, match="its ETag is another"):
        ExactFile(file.uri, file.size_bytes, "0" * 32, S3).read()


def explained(call, *args: object) -> str:
    started_s = time.monotonic()
    with pytest.raises((StorageError, DataError)) as error:
        call(*args)
    assert time.monotonic() - started_s < 15
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return str(error.value)


CALLS = [storage.read_bytes, storage.exists, find_files, lambda uri, s3: storage.write_bytes(uri, b"x", s3)]
CALL_NAMES = ["read", "exists", "find", "write"]


@pytest.mark.usefixtures("s3_env")
@pytest.mark.parametrize("call", CALLS, ids=CALL_NAMES)
def test_an_unknown_bucket(bucket: str, call) -> None:
    message = explained(call, "s3://corpsu/v1/x", S3)
    assert message.startswith("s3://corpsu/v1/x: cannot ")
    assert "no such bucket 'corpsu' at http://127.0.0.1:" in message and "Nearest existing bucket: 'corpus'" in message


@pytest.mark.usefixtures("s3_env")
@pytest.mark.parametrize("call", CALLS, ids=CALL_NAMES)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("AWS_ACCESS_KEY_ID", "the access key is not known there"),
        ("AWS_SECRET_ACCESS_KEY", "the secret key does not belong"),
    ],
)
def test_wrong_keys(bucket: str, call, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "wrong-value")
    message = explained(call, f"{bucket}/plain.jsonl", S3)
    assert f"access denied: {words}" in message and "AWS_ACCESS_KEY_ID" in message
    assert "wrong-value" not in message


@pytest.mark.usefixtures("s3_env")
@pytest.mark.parametrize("call", CALLS, ids=CALL_NAMES)
def test_no_keys(bucket: str, call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials found" in explained(call, f"{bucket}/plain.jsonl", S3)


@pytest.mark.usefixtures("s3_env")
def test_a_missing_name_suggests_the_nearest(bucket: str) -> None:
    source = SourceSection(name="docs", uri=bucket + "/plian.jsonl", weight=None)
    assert "Nearest existing name: s3://corpus/v1/plain.jsonl" in explained(list_files, source, S3)
    assert "no such object" in explained(storage.read_bytes, bucket + "/plian.jsonl", S3)


@pytest.mark.usefixtures("s3_env")
def test_an_endpoint_that_speaks_no_tls(bucket: str, s3_env: S3Server) -> None:
    s3 = S3Section(endpoint_url=s3_env.endpoint.replace("http://", "https://"))
    assert "cannot connect to https://127.0.0.1" in explained(storage.read_bytes, f"{bucket}/plain.jsonl", s3)
    assert "cannot connect to https://127.0.0.1" in explained(find_files, f"{bucket}/plain.jsonl", s3)


@pytest.mark.usefixtures("s3_env")
def test_an_object_that_vanished_after_listing(bucket: str, s3_env: S3Server) -> None:
    s3_env.client().put_object(Bucket="corpus", Key="brief/a.txt", Body=b"here")
    piece = plan_slices("docs", list_files(SourceSection(name="docs", uri="s3://corpus/brief", weight=None), S3), 5000)[0]
    s3_env.client().delete_object(Bucket="corpus", Key="brief/a.txt")
    assert "brief/a.txt: cannot read 4 bytes at 0 of 4: no such object" in explained(lambda: list(read_slice(piece, "text", S3)))
