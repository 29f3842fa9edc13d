"""A run that is cut in two by a checkpoint ends exactly as the uncut one; what is damaged, full or of another run does no harm."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from llm.errors import CheckpointError
from llm.metrics import read_rows, rows_of
from tests.distributed.checkpoint_runs import (
    MODEL,
    Layout,
    damage,
    engine_layout,
    layout_config,
    open_store,
    train_run,
)
from tests.distributed.layouts import llama, make_job, run_ranks

STEPS, CUT = 8, 4


def run(layout: Layout, steps: int, folder: Path, model: dict[str, Any] = MODEL, every: int = 0, **train: Any) -> list[str]:
    config = layout_config(layout, steps, {"every_steps": every}, **train)
    return run_ranks(train_run, config.parallel.workers, config, str(folder), model)


@pytest.mark.parametrize("layout", [(0, 1, 2), (1, 1, 2), (2, 1, 2), (3, 1, 2), (1, 2, 2), (3, 2, 1)])
def test_resumed_equals_uninterrupted(tmp_path, layout):
    expected = run(layout, STEPS, tmp_path / "whole")
    run(layout, CUT, tmp_path / "cut")
    assert run(layout, STEPS, tmp_path / "cut") == expected
    assert open_store(str(tmp_path / "cut")).steps() == [STEPS, CUT]


@pytest.mark.parametrize(("layout", "train"), [
    ((1, 1, 2), {"optimizer": "sgd"}),
    ((1, 1, 2), {"optimizer": "muon"}),
    ((2, 1, 2), {"optimizer": "muon"}),
    ((3, 1, 2), {"optimizer": "muon"}),
    ((0, 1, 2), {"precision": "bf16"}),
    ((1, 1, 2), {"precision": "bf16"}),
    ((3, 1, 2), {"precision": "bf16"}),
])  # fmt: skip
def test_other_optimizers_and_master_weights_survive_too(tmp_path, layout, train):
    """Saved every second step: Muon's momentum moves within the backward pass, so its copy must not be late."""
    expected = run(layout, STEPS, tmp_path / "whole", every=2, **train)
    run(layout, CUT + 1, tmp_path / "cut", every=2, **train)
    assert run(layout, STEPS, tmp_path / "cut", every=2, **train) == expected


@pytest.mark.parametrize(("saved", "goes_on", "model"), [
    ((2, 1, 2), (1, 2, 2), llama(vocab_size=97, tie_word_embeddings=True)),
    ((3, 2, 1), (0, 1, 2), llama(model_type="qwen2", vocab_size=97)),
])  # fmt: skip
def test_another_layout_goes_on_with_the_same_losses_and_ledger(tmp_path, saved, goes_on, model):
    run((1, 1, 1), STEPS, tmp_path / "whole", model)
    run(saved, CUT, tmp_path / "cut", model)
    run(goes_on, STEPS, tmp_path / "cut", model)
    expected, resumed = (rows_of(read_rows(tmp_path / name / "metrics.jsonl"), "step") for name in ("whole", "cut"))
    assert [row["ledger"] for row in resumed] == [row["ledger"] for row in expected]
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in expected], abs=1e-4)


def test_the_newest_whole_checkpoint_is_taken_and_the_stream_begins_at_its_cursor(tmp_path):
    layout = (1, 1, 2)
    expected = run(layout, STEPS, tmp_path / "whole", every=2)
    run(layout, 6, tmp_path / "cut", every=2)
    for step, rank in ((6, 1), (4, 0)):
        damage(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}" / f"rank-0000{rank}.safetensors")
    assert run(layout, STEPS, tmp_path / "cut", every=2) == expected
    rows = read_rows(tmp_path / "cut" / "metrics.jsonl")
    damaged = rows_of(rows, "event", "damaged")
    assert [row["step"] for row in damaged] == [6, 4]
    assert "rank 1 could not" in damaged[0]["reason"]
    assert "are not those that were saved" in damaged[1]["reason"]
    assert all(Path(row["path"]).is_dir() for row in damaged)
    assert rows_of(rows, "event", "restart")[-1]["step"] == 2
    assert [row["step"] for row in rows_of(rows, "step")] == list(range(1, STEPS + 1))
    assert open_store(str(tmp_path / "cut")).steps()[:3] == [8, 6, 4]


def test_a_run_that_lost_all_its_checkpoints_does_not_begin_anew(tmp_path):
    run((1, 1, 2), CUT, tmp_path)
    damage(tmp_path / "checkpoints" / f"step-{CUT:08d}" / "rank-00001.safetensors")
    with pytest.raises(CheckpointError, match="holds no whole checkpoint of at most 4 steps"):
        run((1, 1, 2), STEPS, tmp_path)


def test_another_kind_of_run_is_refused_by_name(tmp_path):
    run((1, 1, 2), CUT, tmp_path)
    with pytest.raises(CheckpointError, match="optimizer=adamw there, sgd here"):
        run((1, 1, 2), STEPS, tmp_path, optimizer="sgd")
    with pytest.raises(CheckpointError, match="saved from another model"):
        run((1, 1, 2), STEPS, tmp_path, llama(vocab_size=97, hidden_size=64))
    assert open_store(str(tmp_path)).steps() == [CUT], "a checkpoint that does not fit is not a damaged one"


def test_muon_goes_to_the_same_layout_only(tmp_path):
    run((1, 1, 2), CUT, tmp_path, optimizer="muon")
    with pytest.raises(CheckpointError, match="Muon's state goes to the same layout only"):
        run((2, 1, 2), STEPS, tmp_path, optimizer="muon")


def _full_disk(rank: int, world_size: int, run_uri: str) -> tuple[list[str], list[int]]:
    """Rank 1's disk is full from the second save on; (errors, steps trained) of a loop that goes on saving."""
    from llm.checkpoint.on_disk import DiskCheckpoints
    from llm.checkpoint.save import CheckpointSaver
    from llm.parallel.mesh import Mesh
    from llm.state import TrainState
    from llm.train.loop import build_engine, steps
    from tests.distributed.checkpoint_runs import batches_from

    config = layout_config((1, 1, 2), STEPS)
    mesh, errors, trained = Mesh(rank, world_size, 1), [], []
    engine = build_engine(make_job(config, MODEL), mesh)
    saver = CheckpointSaver(engine, engine_layout(config), open_store(run_uri), keep=3)
    write = DiskCheckpoints.write

    def fails(self: Any, folder: str, name: str, chunks: Any) -> Any:
        if name.startswith("rank-00001") and folder.startswith("step-00000004"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, folder, name, chunks)

    DiskCheckpoints.write = fails
    for state, _, _ in steps(
        make_job(config, MODEL), engine, batches_from(config, mesh, 0, STEPS), TrainState(), lambda before: 0, saver.wait_snapshot
    ):
        trained.append(state.step)
        if state.step % 2 == 0:
            try:
                saver.save(state)
            except CheckpointError as error:
                errors.append(str(error))
    saver.wait_published()
    return errors, trained


def test_a_full_disk_is_told_to_every_rank_at_the_next_save_and_hangs_nobody(tmp_path):
    found = run_ranks(_full_disk, 2, str(tmp_path))
    assert [trained for _, trained in found] == [list(range(1, STEPS + 1))] * 2
    assert [len(errors) for errors, _ in found] == [1, 1]
    assert "rank 1 could not write its part of the checkpoint; its own message says why" in found[0][0][0]
    assert "No space left on device" in found[1][0][0]
    assert "Free some space" in found[1][0][0]
    assert open_store(str(tmp_path)).steps() == [8, 2], "the failed save raised instead of beginning that of step 6"
    assert not list((tmp_path / "checkpoints").glob("*.tmp-*")), "what was written of it is gone"


def _save_where_nothing_can_be_removed(rank: int, world_size: int, config: Any) -> tuple[list[int], list[str]]:
    from llm import retry
    from llm.checkpoint import on_s3
    from llm.checkpoint.save import CheckpointSaver
    from llm.checkpoint.store import CheckpointStore
    from llm.config import S3Section
    from llm.parallel.mesh import Mesh
    from llm.state import TrainState
    from llm.train.build import build_engine
    from tests.distributed.checkpoint_runs import engine_layout
    from tests.faults import memory_s3

    server: Any = memory_s3.MemoryS3()
    retry.FIRST_WAIT_S, on_s3.ATTEMPTS, on_s3.s3_once = 0.001, 2, lambda section: server
    engine = build_engine(make_job(config, MODEL), Mesh(rank, world_size, 1))
    store = CheckpointStore("s3://b/run", S3Section())
    saver = CheckpointSaver(engine, engine_layout(config), store, keep=2)

    def refuse(**_: Any) -> None:
        raise memory_s3._error("SlowDown", 503)

    server.delete_object = refuse
    for step in (1, 2, 3):
        saver.save_now(TrainState(step=step))
    fresh = CheckpointStore("s3://b/run", S3Section())
    assert all(fresh.open(step).damage() == {} for step in fresh.steps())
    return fresh.steps(), [saved.unpruned for saved in saver.finished()]


def test_a_checkpoint_stays_where_older_ones_cannot_be_removed():
    steps, unpruned = run_ranks(_save_where_nothing_can_be_removed, 1, layout_config((0, 1, 1), STEPS))[0]
    assert steps == [3, 2, 1] and "SlowDown" in unpruned[-1] and unpruned[:-1] == ["", ""]
