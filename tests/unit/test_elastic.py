"""Which sizes a run may have, and where its workers go."""

from __future__ import annotations

import pytest

from llm.config import RunConfig
from llm.config_file import parse_run
from llm.errors import ConfigError
from llm.train.elastic import legal_workers, place_workers, with_workers
from tests.distributed.layouts import make_config


def config(**parallel: int) -> RunConfig:
    return make_config(parallel=parallel, train={"steps": 2, "batch_rows": 24, "lr": 1e-2})


@pytest.mark.parametrize(
    ("parallel", "legal"),
    [
        ({"workers": 4, "tensor": 2}, [4]),
        ({"workers": 4, "tensor": 2, "min_workers": 2}, [4, 2]),
        ({"workers": 8, "min_workers": 1}, [8, 6, 4, 3, 2, 1]),  # 5 and 7 do not divide 24 rows
        ({"workers": 12, "tensor": 2, "min_workers": 4}, [12, 8, 6, 4]),
    ],
)
def test_legal_sizes_share_out_the_batch_in_whole_tensor_groups(parallel, legal):
    assert legal_workers(config(**parallel)) == legal
    for workers in legal:
        assert with_workers(config(**parallel), workers).rank_rows * (workers // parallel.get("tensor", 1)) == 24


def test_a_legal_size_shares_out_the_batches_of_every_stage():
    train = {"batch_rows": 24, "batch_schedule": [{"from_step": 3, "rows": 32}, {"from_step": 9, "rows": 48}]}
    made = make_config(parallel={"workers": 8, "min_workers": 1}, train=train)
    assert legal_workers(made) == [8, 4, 2, 1]  # 6 and 3 do not divide 32 rows
    assert [made.train.rows_at(step) for step in (0, 2, 3, 8, 9, 100)] == [24, 24, 32, 32, 48, 48]
    assert [made.train.rows_before(step) for step in range(30)] == [sum(map(made.train.rows_at, range(step))) for step in range(30)]
    assert [with_workers(made, 4).microbatch_rows_at(step) for step in (0, 3, 9)] == [6, 8, 12]


@pytest.mark.parametrize(
    ("room", "tensor", "legal", "at_most", "nodes"),
    [
        ({"a": 2, "b": 2}, 2, [4, 2], 9, ["a", "a", "b", "b"]),
        ({"b": 3, "a": 1}, 2, [4, 2], 9, ["b", "b"]),  # no tensor group over two nodes
        ({"a": 2, "b": 4}, 2, [6, 4, 2], 5, ["b", "b", "b", "b"]),
        ({"a": 1}, 2, [4, 2], 9, []),
        ({}, 1, [4, 2], 9, []),
    ],
)
def test_workers_go_where_whole_tensor_groups_fit(room, tensor, legal, at_most, nodes):
    assert place_workers(room, tensor, legal, at_most) == nodes


@pytest.mark.parametrize("least", ["3", "6"])
def test_an_illegal_min_workers_is_refused_with_the_nearest_legal_one(least):
    text = (
        "run: {name: x}\nmodel: {preset: llama_1m}\ndata: {seq_len: 8, sources: [{name: a, uri: /x}]}\n"
        f"parallel: {{workers: 4, tensor: 2, min_workers: {least}}}\ntrain: {{steps: 1, batch_rows: 8, lr: 0.1}}\n"
    )
    with pytest.raises(ConfigError, match=r"parallel.min_workers=.*Nearest legal value: (2|4)"):
        parse_run(text, "x")
