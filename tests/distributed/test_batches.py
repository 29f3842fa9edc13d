"""What each rank is given of a batch: tensor peers the same tokens, data ranks their own rows, and all the same facts about the whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from llm.data.ledger import row_digests
from tests.distributed.layouts import Given, blocks_of, run_ranks, unequal_rows

STEPS, BATCH_ROWS, SEQ_LEN = 3, 8, 16


def fetch(rank: int, world_size: int, tensor: int) -> list[tuple[np.ndarray, np.ndarray, int, Any, bytes]]:
    from llm.data.batches import BatchFetcher, DataGroups
    from llm.data.order import Schedule
    from llm.parallel.mesh import Mesh
    from llm.state import TrainState

    mesh = Mesh(rank, world_size, tensor)
    rank_rows = BATCH_ROWS // mesh.data_size
    ids, segments = unequal_rows(STEPS * BATCH_ROWS, SEQ_LEN)
    fetcher = BatchFetcher(
        None if mesh.tensor_rank else Given(blocks_of(ids, segments, rank_rows, mesh.data_rank, mesh.data_size)),
        mesh,
        DataGroups(mesh),
        start=TrainState(),
        schedule=Schedule(),
        num_batches=STEPS,
        rank_rows_at=lambda step: rank_rows,
        unit_rows=rank_rows,
        seq_len=SEQ_LEN,
        isolate=False,
        max_bad_frac=0.0,
    )
    return [(batch.ids.numpy(), batch.segments.numpy(), batch.predicted_tokens, batch.cursor, batch.digests.tobytes()) for batch in fetcher]


def test_tensor_peers_get_identical_tokens_and_every_layout_the_same_batch():
    ids, segments = unequal_rows(STEPS * BATCH_ROWS, SEQ_LEN)
    for world_size, tensor in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 1)):
        ranks = run_ranks(fetch, world_size, tensor)
        for step in range(STEPS):
            rows = slice(step * BATCH_ROWS, (step + 1) * BATCH_ROWS)
            for rank in range(world_size):
                first = rank // tensor * tensor
                np.testing.assert_array_equal(ranks[rank][step][0], ranks[first][step][0])
                np.testing.assert_array_equal(ranks[rank][step][1], ranks[first][step][1])
                assert ranks[rank][step][2:] == ranks[0][step][2:]
            np.testing.assert_array_equal(np.concatenate([ranks[r][step][0] for r in range(0, world_size, tensor)]), ids[rows])
            np.testing.assert_array_equal(np.concatenate([ranks[r][step][1] for r in range(0, world_size, tensor)]), segments[rows])
            assert ranks[0][step][4] == row_digests(ids[rows], segments[rows]).tobytes()
            assert ranks[0][step][2] == (segments[rows][:, 1:] != 0).sum()
