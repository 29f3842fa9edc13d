"""Checkpoints through a connection that fails a fifth of all requests, writes too: all is published once, whole, or nothing is."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm import retry
from llm.checkpoint import on_s3
from llm.checkpoint.digest import digest
from llm.checkpoint.manifest import BLOCK_BYTES
from llm.checkpoint.newest import read_newest
from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from llm.errors import CheckpointError, DamagedCheckpointError, StorageError
from tests.distributed.checkpoint_runs import MODEL, layout_config, train_run
from tests.distributed.layouts import run_ranks
from tests.made_checkpoint import contents, publish, read_all
from tests.s3_proxy import FAULTS, Proxy, start_s3_proxy
from tests.s3_server import S3Server

S3 = S3Section(connect_timeout_s=3, request_timeout_s=1)
RATE = 0.2
BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> S3Server:
    s3_server.client().create_bucket(Bucket=BUCKET)
    return s3_server


@pytest.fixture
def proxy(bucket: S3Server, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "_jitter", random.Random(1))
    with start_s3_proxy(s3_env.endpoint, seed=1, stall_s=2.0) as proxy:  # longer than the client waits
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def test_a_checkpoint_on_s3_reads_as_it_was_written(proxy: Proxy) -> None:
    store = CheckpointStore(f"s3://{BUCKET}/plain", S3)
    assert store.steps() == []
    for step in (1, 2, 3, 4):
        publish(store, step)
        assert store.steps()[0] == step and store.open(step).damage() == {}
    assert store.prune(keep=1, keep_every=2) == [1]  # 2: a multiple; 4: the newest; 3: one of the last two good ones
    read_all(store, 4)
    found = read_newest(store)
    assert found is not None and found.value.train.step == 4
    with pytest.raises(CheckpointError, match="is there already, and whole"):
        store.begin(4)
    store.set_aside(4)
    assert store.steps() == [3, 2]
    publish(store, 4)
    assert {name: store.open(4).read(name) for name in contents(4)} == contents(4)


def test_damage_on_s3_is_found(proxy: Proxy, bucket: S3Server) -> None:
    store, client = CheckpointStore(f"s3://{BUCKET}/damaged", S3), bucket.client()
    for step in (1, 2):
        publish(store, step)
    keys = [i["Key"] for i in client.list_objects_v2(Bucket=BUCKET, Prefix="damaged/checkpoints/step-00000002/")["Contents"]]
    for key in keys:
        data = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        for changed in (data[:-1], data + b" ", bytes([data[0] ^ 1]) + data[1:], b""):
            client.put_object(Bucket=BUCKET, Key=key, Body=changed)
            with pytest.raises(DamagedCheckpointError):
                store.open(2).require_whole()
        client.put_object(Bucket=BUCKET, Key=key, Body=data)
    client.delete_object(Bucket=BUCKET, Key=next(key for key in keys if key.endswith("state.json")))
    found = read_newest(store)
    assert found is not None and found.published.step == 1 and "state.json is missing" in (found.note or "")
    publish(store, 2)  # the damaged one is set aside by `begin`
    assert store.open(2).damage() == {} and store.steps() == [2, 1]


def test_a_large_file_in_parts(proxy: Proxy, bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks and more, five parts of 5 MiB, S3's least; with failing requests."""
    monkeypatch.setattr(on_s3, "PART_BYTES", 5 << 20)
    data = random.Random(0).randbytes(BLOCK_BYTES + (7 << 20) + 123)
    store = CheckpointStore(f"s3://{BUCKET}/large", S3)
    proxy.rate = RATE
    folder = store.begin(1)
    entry = store.write(folder, "big.safetensors", (data[i : i + 1_000_003] for i in range(0, len(data), 1_000_003)))
    store.publish(1, folder, {"big.safetensors": entry})
    published = store.open(1)
    start, stop = BLOCK_BYTES - 5, BLOCK_BYTES + 9
    assert published.read_range("big.safetensors", start, stop) == data[start:stop]
    assert b"".join(published.blocks("big.safetensors")) == data
    proxy.rate = 0

    def broken() -> Iterator[bytes]:
        yield data
        raise OSError("the GPU is gone")

    with pytest.raises(StorageError):
        store.write(store.begin(2), "big.safetensors", broken())
    assert "Uploads" not in bucket.client().list_multipart_uploads(Bucket=BUCKET), "a begun upload was left"


def test_a_fifth_of_the_requests_failing_changes_nothing(proxy: Proxy) -> None:
    store = CheckpointStore(f"s3://{BUCKET}/faulty", S3)
    proxy.rate = RATE
    for step in range(1, 9):
        publish(store, step)
        store.prune(keep=2, keep_every=5)
    assert store.steps() == [8, 7, 5]
    for step in store.steps():
        assert {name: store.open(step).read(name) for name in contents(step)} == contents(step)
    assert all(proxy.seen[fault] >= 3 for fault in FAULTS), proxy.seen


@pytest.mark.parametrize("fault", FAULTS)
def test_a_connection_that_stays_broken_is_a_named_error(proxy: Proxy, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_s3, "ATTEMPTS", 2)
    monkeypatch.setattr(proxy, "stall_s", 1.2)
    store = CheckpointStore(f"s3://{BUCKET}/broken-{fault}", S3)
    folder = store.begin(1)
    proxy.rate, proxy.faults = 1, (fault,)
    with pytest.raises(StorageError, match=f"broken-{fault}"):
        store.write(folder, "state.json", [b"a"])
    proxy.rate = 0
    assert store.steps() == []


def _train_on_s3(rank: int, world_size: int, environment: dict[str, str], *given: Any) -> str:
    os.environ |= environment
    os.environ.pop("AWS_PROFILE", None)
    retry.FIRST_WAIT_S = 0.05
    return train_run(rank, world_size, *given)


def train_twice(proxy: Proxy, server: S3Server, run_uri: str) -> list[str]:
    """Trains 2 ranks to step 4, then from its checkpoint to step 8, saving every second step; what they hold in the end."""
    environment = {**server.env, "AWS_ENDPOINT_URL": proxy.endpoint}
    for steps in (4, 8):
        config = layout_config((1, 1, 2), steps, {"every_steps": 2})
        ends = run_ranks(_train_on_s3, 2, environment, config, run_uri, MODEL)
    return ends


def expected(folder: Path) -> list[str]:
    return run_ranks(train_run, 2, layout_config((1, 1, 2), 8, {"every_steps": 2}), str(folder / "undisturbed"), MODEL)


def require_equal_end(proxy: Proxy, bucket: S3Server, folder: Path, runs: int) -> None:
    ends = expected(folder)
    proxy.stall_s = 0.5
    hashes = digest(CheckpointStore(str(folder / "undisturbed"), S3Section()).open(8))
    for number in range(runs):
        proxy.rate = RATE
        uri = f"s3://{BUCKET}/trained-{runs}-{number}"
        assert train_twice(proxy, bucket, uri) == ends, number
        proxy.rate = 0
        assert digest(CheckpointStore(uri, S3).open(8)) == hashes
        print(number, dict(proxy.seen))


def test_a_run_whose_requests_fail_ends_as_the_undisturbed_one(proxy: Proxy, bucket: S3Server, tmp_path: Path) -> None:
    require_equal_end(proxy, bucket, tmp_path, 1)


@pytest.mark.faults
def test_10_runs_whose_requests_fail_end_as_the_undisturbed_one(proxy: Proxy, bucket: S3Server, tmp_path: Path) -> None:
    require_equal_end(proxy, bucket, tmp_path, 10)
