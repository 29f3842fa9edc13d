"""A stop that one rank is asked for: all ranks save after the same step and end, and the run goes on from there as if nothing had been."""

from __future__ import annotations

import itertools

from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from llm.train.life import Wish
from tests.distributed.layouts import Given, blocks_of, llama, make_config, make_job, run_ranks, unequal_rows

STEPS, ASKED = 12, 5


def _train(rank: int, world_size: int, config, run_uri: str, asks: int | None) -> tuple[str, int, str]:
    """Trains from the newest checkpoint; how it ended, the step and the ledger it has come to. Rank `asks` asks for a stop with its fifth
    batch."""
    from llm.checkpoint.newest import newest_state
    from llm.errors import PlannedStop
    from llm.parallel.mesh import Mesh
    from llm.train.loop import train

    mesh, store = Mesh(rank, world_size, config.parallel.tensor), CheckpointStore(run_uri, S3Section())
    state = newest_state(store)
    ids, segments = unequal_rows(STEPS * config.train.batch_rows, config.data.seq_len)
    first = state.step * config.train.batch_rows
    reader = (
        None if mesh.tensor_rank else Given(blocks_of(ids[first:], segments[first:], config.rank_unit_rows, mesh.data_rank, mesh.data_size))
    )
    batches = itertools.count(1)
    wish = (lambda: Wish.SIGTERM if next(batches) >= ASKED else Wish.NONE) if rank == asks else (lambda: Wish.NONE)
    try:
        end = train(make_job(config, llama(), run_uri), mesh, reader, state, wish=wish)
        return "finished", end.step, end.ledger
    except PlannedStop as stop:
        end = newest_state(store)
        return str(stop), end.step, end.ledger


def test_one_rank_asks_and_all_stop_after_the_same_step_and_nothing_is_lost(tmp_path):
    config = make_config(parallel={"workers": 2, "zero_stage": 1}, train={"steps": STEPS, "microbatch_rows": 2, "schedule": "constant"})
    whole = run_ranks(_train, 2, config, str(tmp_path / "whole"), None)
    stopped = run_ranks(_train, 2, config, str(tmp_path / "cut"), 1)
    assert [(step, "SIGTERM" in why) for why, step, _ in stopped] == [(ASKED, True)] * 2
    assert run_ranks(_train, 2, config, str(tmp_path / "cut"), None) == whole
    assert whole[0][:2] == ("finished", STEPS)
