"""The doctor's check of a storage: a real put, get and delete, and what it says where one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.config import S3Section
from llm.errors import StorageError
from llm.storage_check import check_storage, delete_object, put_object
from tests.s3_server import S3Server


@pytest.fixture
def bucket(s3_env: S3Server) -> str:
    name = "doctor"
    if name not in {each["Name"] for each in s3_env.client().list_buckets()["Buckets"]}:
        s3_env.client().create_bucket(Bucket=name)
    return name


def test_the_owner_may_and_nothing_is_left(s3_env: S3Server, bucket: str) -> None:
    uri = f"s3://{bucket}/runs"
    shared = put_object(uri, S3Section())
    check_storage(uri, S3Section(), shared)
    delete_object(uri, shared[0], S3Section())
    assert s3_env.client().list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_a_reader_is_refused_by_name(s3_env: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_env.reader_env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=r"cannot write: access denied \(AccessDenied\) at .*s3:PutObject"):
        check_storage(f"s3://{bucket}/runs", S3Section())


def test_a_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    mine, other = str(tmp_path / "mine"), str(tmp_path / "other")
    shared = put_object(mine, S3Section())
    check_storage(mine, S3Section(), shared)
    with pytest.raises(StorageError, match="that every node mounts it"):
        check_storage(other, S3Section(), shared)
    with pytest.raises(StorageError, match="no shared folder"):
        check_storage(mine, S3Section(), (shared[0], b"other bytes"))
