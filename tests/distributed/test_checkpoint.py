"""A run that is cut in two by a checkpoint ends exactly as the uncut one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from llm.checkpoint.read import read_index, read_whole
from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from llm.errors import CheckpointError
from llm.metrics import read_rows, rows_of
from tests.distributed.layouts import Given, blocks_of, llama, make_config, make_job, run_ranks, unequal_rows

STEPS, CUT = 8, 4


def _train(rank: int, world_size: int, config, run_uri: str, model=None) -> str:
    """Trains to config.train.steps from the newest checkpoint; a hash over this rank's weights and moments."""
    import torch.distributed as dist

    from llm.checkpoint.fragments import Ownership
    from llm.checkpoint.newest import newest_state
    from llm.parallel.mesh import Mesh
    from llm.train import loop

    mesh = Mesh(rank, world_size, config.parallel.tensor)
    job = make_job(config, model or llama(), run_uri)
    state = newest_state(CheckpointStore(run_uri, S3Section()))
    ids, segments = unequal_rows(STEPS * config.train.batch_rows, config.data.seq_len)
    first = state.step * config.train.batch_rows
    reader = None
    if mesh.tensor_rank == 0:
        reader = Given(blocks_of(ids[first:], segments[first:], config.rank_rows, mesh.data_rank, mesh.data_size))
    engines = []
    build = loop.build_engine
    loop.build_engine = lambda *args: engines.append(build(*args)) or engines[0]
    loop.train(job, mesh, reader, state)
    digest = hashlib.sha256()
    for fragment in Ownership(engines[0]).fragments():
        for key, value in sorted((fragment.values() | fragment.undivided()).items()):
            digest.update(f"{fragment.name}|{key}".encode() + value.detach().contiguous().numpy().tobytes())
    dist.barrier()
    return digest.hexdigest()


def _config(steps: int, workers: int, tensor: int, stage: int, **train):
    return make_config(
        parallel={"workers": workers, "tensor": tensor, "zero_stage": stage},
        train={"steps": steps, "microbatch_rows": 2, "schedule": "constant", **train},
    )


@pytest.mark.parametrize(("workers", "tensor", "stage"), [(2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3), (4, 2, 1), (2, 2, 3)])
def test_resumed_equals_uninterrupted(tmp_path, workers, tensor, stage):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    expected = run_ranks(_train, workers, _config(STEPS, workers, tensor, stage), whole)
    run_ranks(_train, workers, _config(CUT, workers, tensor, stage), cut)
    resumed = run_ranks(_train, workers, _config(STEPS, workers, tensor, stage), cut)
    assert resumed == expected
    assert CheckpointStore(cut, S3Section()).steps() == [STEPS, CUT]


@pytest.mark.parametrize(("optimizer", "stage"), [("sgd", 1), ("muon", 1), ("muon", 2), ("muon", 3)])
def test_momentum_survives_too(tmp_path, optimizer, stage):
    expected = run_ranks(_train, 2, _config(STEPS, 2, 1, stage, optimizer=optimizer), str(tmp_path / "whole"))
    run_ranks(_train, 2, _config(CUT, 2, 1, stage, optimizer=optimizer), str(tmp_path / "cut"))
    assert run_ranks(_train, 2, _config(STEPS, 2, 1, stage, optimizer=optimizer), str(tmp_path / "cut")) == expected


# workers, tensor, zero stage, of the run that saves and of the one that goes on
RELAYOUTS = [
    ((2, 1, 1), (1, 1, 1)),
    ((1, 1, 2), (2, 1, 3)),
    ((2, 1, 0), (4, 2, 1)),
    ((4, 2, 1), (2, 1, 2)),
    ((2, 2, 3), (2, 1, 0)),
    ((4, 1, 3), (2, 2, 0)),
]


@pytest.mark.parametrize(("saved", "goes_on"), RELAYOUTS)
def test_another_layout_goes_on_with_the_same_losses_and_ledger(tmp_path, saved, goes_on):
    """An odd vocabulary, so that a split head has unequal parts."""
    model = llama(vocab_size=97)
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    run_ranks(_train, 1, _config(STEPS, 1, 1, 1), whole, model)
    run_ranks(_train, saved[0], _config(CUT, *saved), cut, model)
    run_ranks(_train, goes_on[0], _config(STEPS, *goes_on), cut, model)
    expected, resumed = (rows_of(read_rows(f"{run}/metrics.jsonl"), "step") for run in (whole, cut))
    assert [row["ledger"] for row in resumed] == [row["ledger"] for row in expected]
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in expected], abs=1e-4)
    opened = [CheckpointStore(run, S3Section()).open(STEPS) for run in (whole, cut)]
    weights = [{(name, key): tensor for name, key, tensor in read_whole(each, read_index(each))} for each in opened]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-5, rtol=1e-3, msg=str(name))


def test_another_kind_of_run_and_a_damaged_file_are_refused_by_name(tmp_path):
    run = str(tmp_path / "run")
    run_ranks(_train, 2, _config(CUT, 2, 1, 1), run)
    with pytest.raises(CheckpointError, match="optimizer=adamw there, sgd here"):
        run_ranks(_train, 2, _config(STEPS, 2, 1, 1, optimizer="sgd"), run)
    damaged = Path(run) / "checkpoints" / f"step-{CUT:08d}" / "rank-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors is damaged|rank 1 could not read its part"):
        run_ranks(_train, 2, _config(STEPS, 2, 1, 1), run)
