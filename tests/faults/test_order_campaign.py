"""`make faults`: 10,000 random ways through a stream, each batch compared with the slow reference."""

from __future__ import annotations

import random

import pytest

from tests.stream_reference import check, random_case

CASES, PARTS = 10_000, 20


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_batch_of_many_cases_equals_the_slow_reference(part):
    size = CASES // PARTS
    batches = sum(check(random_case(random.Random(seed))) for seed in range(part * size, (part + 1) * size))
    assert batches >= 6 * size
