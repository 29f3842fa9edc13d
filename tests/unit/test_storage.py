from __future__ import annotations

import pickle
import socket
import time
from pathlib import Path

import pytest

from llm import storage
from llm.config import S3Section
from llm.errors import StorageError
from llm.file_listing import find_files, nearest_uri

S3 = S3Section()


def test_open_storage_takes_every_local_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for uri in ("runs/x", str(tmp_path / "runs/x"), f"file://{tmp_path}/runs/x", "~/runs/x", "./runs/../runs/x"):
        assert storage.open_storage(uri, S3)[1] == str(tmp_path / "runs/x")
    assert storage.local_path("file:///a%20b") == "/a b"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gs://b/x", "gs:// is not supported. Legal: a local path"),
        ("s3://", "names no bucket"),
        ("file://relative/x", "file:///relative/x"),
    ],
)
def test_unusable_uris(uri: str, words: str) -> None:
    with pytest.raises(StorageError, match=words):
        storage.open_storage(uri, S3)


def test_join() -> None:
    assert storage.join("s3://b/runs/", "a", "/b.json") == "s3://b/runs/a/b.json"
    assert storage.join("runs", "a/b") == "runs/a/b"
    assert storage.join("/", "a") == "/a"
    assert storage.join("runs") == "runs"


def test_bytes_round_trip_and_replace(tmp_path: Path) -> None:
    uri = str(tmp_path / "new" / "folder" / "x.bin")
    assert not storage.exists(uri, S3)
    for data in (b"one", b"", b"\0" * 100_000):
        storage.write_bytes(uri, data, S3)
        assert storage.read_bytes(uri, S3) == data
    assert storage.exists(uri, S3) and storage.exists(str(tmp_path), S3)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["x.bin"]


def test_compressed_bytes_are_read_as_stored(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(b"not gzip")
    assert storage.read_bytes(str(tmp_path / "x.gz"), S3) == b"not gzip"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"cannot write: No space left on device. Free some space"):
        storage.write_bytes(str(target), b"new", S3)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_local_errors_name_the_file_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as error:
        storage.read_bytes(str(tmp_path / "none"), S3)
    assert str(error.value).startswith(f"{tmp_path}/none: cannot read: No such file or directory")
    assert error.value.__cause__ is None and error.value.__suppress_context__
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # noqa: S301
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        storage.write_bytes(str(tmp_path / "file" / "x"), b"", S3)


def test_other_errors_pass_through() -> None:
    with pytest.raises(KeyError), storage.storage_errors("x", S3):
        raise KeyError("mine")


def test_nearest_uri(tmp_path: Path) -> None:
    (tmp_path / "corpus" / "english").mkdir(parents=True)
    assert nearest_uri(str(tmp_path / "corpsu" / "english"), S3) == str(tmp_path / "corpus")
    assert nearest_uri(str(tmp_path / "corpus" / "englihs"), S3) == str(tmp_path / "corpus" / "english")
    assert nearest_uri(str(tmp_path / "corpus" / "zzz"), S3) is None


@pytest.fixture
def aws_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)


@pytest.mark.usefixtures("aws_keys")
@pytest.mark.parametrize("call", [storage.read_bytes, storage.exists, find_files])
def test_an_endpoint_that_refuses_fails_soon(call) -> None:
    with socket.socket() as unused:  # bound but not listening: connections are refused, and nobody else can take the port
        unused.bind(("127.0.0.1", 0))
        s3 = S3Section(endpoint_url=f"http://127.0.0.1:{unused.getsockname()[1]}")
        started_s = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot connect to http://127.0.0.1:\d+ \(.*refused.*s3.endpoint_url"):
            call("s3://bucket/key", s3)
        assert time.monotonic() - started_s < 10


@pytest.mark.usefixtures("aws_keys")
def test_an_endpoint_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StorageError, match=f"cannot connect to {endpoint}"):
            storage.open_storage("s3://bucket/key", S3)


@pytest.mark.usefixtures("aws_keys")
def test_an_endpoint_that_accepts_and_says_nothing_fails_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        s3 = S3Section(endpoint_url=f"http://127.0.0.1:{mute.getsockname()[1]}", connect_timeout_s=1)
        started_s = time.monotonic()
        with pytest.raises(StorageError, match="timed out"):
            storage.read_bytes("s3://bucket/key", s3)
        assert time.monotonic() - started_s < 5
