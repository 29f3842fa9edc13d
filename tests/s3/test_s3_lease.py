"""The lease of a run on a real S3 server: create-only PUTs let one contender in, and the one that was replaced is told."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm.config import S3Section
from llm.errors import LeaseError
from llm.storage import read_bytes, write_bytes
from llm.train.lease import Lease, held_lease

S3 = S3Section()


@pytest.fixture
def run_uri(s3_env) -> str:
    bucket = f"lease-{uuid.uuid4().hex[:12]}"
    s3_env.client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}/runs/one"


def test_of_many_contenders_on_s3_exactly_one_gets_the_lease(run_uri):
    contenders = [Lease(run_uri, S3, 30, 1) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(Lease.acquire, contenders))
    assert won.count(True) == 1
    contenders[won.index(True)].release()


def test_a_second_driver_is_refused_and_a_dead_one_elsewhere_is_replaced_and_fenced_off(run_uri):
    first = Lease(run_uri, S3, 60, 1)
    assert first.acquire()
    with pytest.raises(LeaseError, match="another driver"), held_lease(run_uri, S3, 3):
        pass
    uri = f"{run_uri}/lease/00000001.json"
    write_bytes(uri, json.dumps({**json.loads(read_bytes(uri, S3)), "machine": "another"}).encode(), S3)
    first.fence.check()
    with held_lease(run_uri, S3, 3, lambda text: None) as second:
        assert second.fence.number == 2
        second.fence.check()
        with pytest.raises(LeaseError, match="taken over"):
            first.fence.check()
    first._lost = LeaseError("seen above")
    first.release()
