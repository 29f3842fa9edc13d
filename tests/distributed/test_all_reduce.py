"""The doctor's all-reduce between gloo processes: a bandwidth for each size, and an end where a rank is missing."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from llm.parallel.all_reduce import SIZES_BYTES, measure
from tests.ports import free_port


def test_each_size_has_a_bandwidth_on_every_rank() -> None:
    where = f"127.0.0.1:{free_port()}"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = [task.result(100) for task in [pool.submit(measure, rank, 2, where, "gloo", 60.0) for rank in range(2)]]
    assert all(set(speed) == set(SIZES_BYTES) and min(speed.values()) > 0 for speed in found)


def test_a_group_that_lacks_a_rank_ends_in_time() -> None:
    began_s = time.monotonic()
    with pytest.raises(Exception, match=r"(?i)time.?d? ?out"):
        measure(0, 2, f"127.0.0.1:{free_port()}", "gloo", 2.0)
    assert time.monotonic() - began_s < 60
