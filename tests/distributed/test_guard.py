"""Bad numbers never move the weights, on any layout: with real engines whose gradients are spoilt."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest

from llm.checkpoint.newest import newest_state
from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from llm.data.ledger import START, advanced, row_digests
from llm.errors import PlannedStop, TrainingError
from llm.metrics import read_rows, rows_of
from llm.train.life import Wish
from tests.distributed.layouts import Given, blocks_of, llama, make_config, make_job, run_ranks, unequal_rows

STEPS = 8
LAYOUTS = [(1, 1, 0), (2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3), (2, 2, 1), (4, 2, 2)]


def _train(rank: int, world_size: int, config, run_uri: str, spoilt: dict[int, list[float]], stop_at: int = 0) -> list[str]:
    """A digest of this rank's weights and moments after each step. `spoilt`: by step (1, 2, ...), the factor of the gradient of rank 0
    in each attempt; `stop_at`: the step after which it is asked to stop. Goes on from the newest checkpoint."""
    from llm.checkpoint.fragments import Ownership
    from llm.parallel.mesh import Mesh
    from llm.train import loop

    mesh, built, digests = Mesh(rank, world_size, config.parallel.tensor), loop.build_engine, []
    start = newest_state(CheckpointStore(run_uri, S3Section()))
    step, attempt = start.step, 0

    def build(job, mesh):
        engine = built(job, mesh)
        backward, update = engine.backward, engine.step

        def spoil(loss, last):
            factors = spoilt.get(step + 1, [])
            backward(loss * factors[attempt] if rank == 0 and attempt < len(factors) else loss, last=last)

        def counted(lr_factor, may_update):
            nonlocal attempt
            found = update(lr_factor, may_update)
            attempt += 1
            return found

        engine.backward, engine.step = spoil, counted
        return engine

    def watched(job, engine, *rest):
        nonlocal step, attempt
        for each in original(job, engine, *rest):
            step, attempt = each[0].step, 0
            digest = hashlib.sha256()
            for fragment in Ownership(engine).fragments():
                for key, value in sorted(fragment.values().items()):
                    digest.update(f"{fragment.name}|{key}".encode() + value.detach().contiguous().numpy().tobytes())
            digests.append(digest.hexdigest())
            yield each

    original, loop.build_engine, loop.steps = loop.steps, build, watched
    ids, segments = (
        rows[start.step * config.train.batch_rows :] for rows in unequal_rows(STEPS * config.train.batch_rows, config.data.seq_len)
    )
    reader = None if mesh.tensor_rank else Given(blocks_of(ids, segments, config.rank_unit_rows, mesh.data_rank, mesh.data_size))
    asked = itertools.count(start.step + 1)
    loop.train(make_job(config, llama(), run_uri), mesh, reader, start, wish=lambda: Wish.SIGTERM if next(asked) == stop_at else Wish.NONE)
    return digests


def _config(workers: int, tensor: int, stage: int, **sections):
    return make_config(
        parallel={"workers": workers, "tensor": tensor, "zero_stage": stage},
        train={"steps": STEPS, "microbatch_rows": 2, "schedule": "constant"},
        **sections,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_transient_fault_changes_nothing_and_a_lasting_one_skips_the_batch(tmp_path, layout):
    config = _config(*layout)
    clean = run_ranks(_train, layout[0], config, str(tmp_path / "clean"), {})
    flipped = run_ranks(_train, layout[0], config, str(tmp_path / "flipped"), {1: [math.nan], 5: [math.inf]})
    assert flipped == clean
    events = rows_of(read_rows(tmp_path / "flipped" / "metrics.jsonl"), "event", "guard")
    assert [(row["step"], row["action"]) for row in events] == [(1, "retried"), (5, "retried")]

    bad = run_ranks(_train, layout[0], config, str(tmp_path / "bad"), {3: [math.nan] * 2})
    for expected, found in zip(clean, bad, strict=True):
        assert found[:2] == expected[:2] and found[2] == found[1], "the third batch moved weights or moments"
        assert len(set(found)) == STEPS - 1, "the others did not"
    rows = rows_of(read_rows(tmp_path / "bad" / "metrics.jsonl"), "step")
    assert [row.get("outcome") for row in rows] == [None, None, "skipped", *[None] * (STEPS - 3)]
    ids, segments = unequal_rows(STEPS * config.train.batch_rows, config.data.seq_len)
    ledger = START
    for i, row in enumerate(rows):
        batch = slice(i * config.train.batch_rows, (i + 1) * config.train.batch_rows)
        ledger = advanced(ledger, row_digests(ids[batch], segments[batch]), "skipped" if i == 2 else "")
        assert row["ledger"] == ledger


def test_the_very_first_batch_can_be_skipped_on_every_stage(tmp_path):
    for stage in range(4):
        run = tmp_path / str(stage)
        found = run_ranks(_train, 2, _config(2, 1, stage), str(run), {1: [math.nan] * 2})
        assert all(len(set(digests)) == STEPS for digests in found)
        assert rows_of(read_rows(run / "metrics.jsonl"), "step")[-1]["loss"] < 5


@pytest.mark.parametrize("layout", [(2, 1, 1), (2, 1, 3)])
def test_many_bad_batches_bring_the_checkpoints_weights_back(tmp_path, layout):
    config = _config(*layout, checkpoint={"every_steps": 2}, guard={"max_skips": 2})
    found = run_ranks(_train, layout[0], config, str(tmp_path), {4: [1e3, 1.0], 5: [math.nan] * 2, 6: [math.nan] * 2})
    for digests in found:
        assert digests[5] == digests[3] == digests[4], "the checkpoint at step 4 holds them"
        assert len(set(digests[5:])) == 3
    rows = rows_of(read_rows(tmp_path / "metrics.jsonl"), "step")
    assert rows[5]["outcome"] == "skipped; weights back to those of step 4"
    assert CheckpointStore(str(tmp_path), S3Section()).steps()[0] == STEPS


def test_the_second_time_it_goes_further_back_and_never_to_weights_of_a_bad_row(tmp_path):
    """A planned stop within a row of bad steps saves there: such a checkpoint is for going on from, not for going back to."""
    config = _config(2, 1, 1, checkpoint={"every_steps": 1, "keep": 8}, guard={"max_skips": 2, "max_rollbacks": 2})
    bad = {step: [math.nan] * 2 for step in (4, 5, 6, 7)}
    found = run_ranks(_train, 2, config, str(tmp_path), bad)
    rows = rows_of(read_rows(tmp_path / "metrics.jsonl"), "step")
    back = "skipped; weights back to those of step"
    assert [row.get("outcome") for row in rows] == [None] * 3 + ["skipped", f"{back} 3", "skipped", f"{back} 2", None]
    for digests in found:
        assert digests[4] == digests[2] and digests[6] == digests[1]


def test_a_stop_within_a_row_of_bad_steps_goes_on_as_if_it_had_not_been(tmp_path):
    config = _config(2, 1, 1, checkpoint={"every_steps": 1, "keep": 8}, guard={"max_skips": 2})
    bad = {step: [math.nan] * 2 for step in (4, 5)}
    whole = run_ranks(_train, 2, config, str(tmp_path / "whole"), bad)
    with pytest.raises(PlannedStop):
        run_ranks(_train, 2, config, str(tmp_path / "cut"), bad, 4)
    saved = CheckpointStore(str(tmp_path / "cut"), S3Section())
    assert saved.steps()[0] == 4 and not newest_state(saved).history.sound
    after = run_ranks(_train, 2, config, str(tmp_path / "cut"), bad)
    assert [digests[-1] for digests in after] == [digests[-1] for digests in whole]
    ledgers = [[row["ledger"] for row in rows_of(read_rows(tmp_path / name / "metrics.jsonl"), "step")] for name in ("cut", "whole")]
    assert ledgers[0] == ledgers[1]


def test_a_run_that_cannot_go_on_says_why(tmp_path):
    with pytest.raises(TrainingError, match=r"3 batches, up to step 4, could not be trained on: .*no sound checkpoint.*Lower train\.lr"):
        run_ranks(_train, 2, _config(2, 1, 1), str(tmp_path), {step: [math.nan] * 2 for step in range(2, 9)})
