"""What the checkpoint tests do on every rank: train and save, restore into another layout, hash what a rank holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.checkpoint.store import CheckpointStore
from llm.config import RunConfig, S3Section
from tests.distributed.layouts import Given, blocks_of, llama, make_config, make_job, unequal_rows

# An odd vocabulary: DeepSpeed splits the head in parts of 49 and 48 rows.
MODEL = llama(vocab_size=97)
MADE_STEPS = 50
Layout = tuple[int, int, int]  # ZeRO stage, tensor size, data size
LAYOUTS: list[Layout] = [(stage, tensor, data) for stage in range(4) for tensor in (1, 2) for data in (1, 2)]


def layout_config(layout: Layout, steps: int, checkpoint: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    stage, tensor, data = layout
    return make_config(
        parallel={"workers": tensor * data, "tensor": tensor, "zero_stage": stage},
        train={"steps": steps, "microbatch_rows": 4, "schedule": "constant", **train},
        checkpoint=checkpoint or {},
    )


def open_store(run_uri: str) -> CheckpointStore:
    return CheckpointStore(run_uri, S3Section())


def batches_from(config: RunConfig, mesh: Any, first_step: int, num_steps: int) -> Any:
    """The batches of steps `first_step` .. , the same rows on every layout."""
    from llm.state import TrainState
    from llm.train.loop import fetch_batches

    reader = given(config, mesh, first_step, first_step + num_steps)
    return fetch_batches(make_job(config, MODEL), mesh, reader, TrainState(step=first_step), num_steps)


def given(config: RunConfig, mesh: Any, first_step: int, end_step: int) -> Given | None:
    if mesh.tensor_rank:
        return None
    ids, segments = _rows(config, end_step)
    first = config.train.rows_before(first_step)
    return Given(blocks_of(ids[first:], segments[first:], config.rank_unit_rows, mesh.data_rank, mesh.data_size))


def _rows(config: RunConfig, num_steps: int) -> Any:
    """The same first rows, however many steps are asked for (up to MADE_STEPS)."""
    return unequal_rows(config.train.rows_before(max(MADE_STEPS, num_steps)), config.data.seq_len)


def engine_layout(config: RunConfig) -> Any:
    from llm.checkpoint.layout import Layout as Saved

    parallel = config.parallel
    return Saved(parallel.workers, parallel.tensor, parallel.zero_stage, config.train.precision, config.train.optimizer)


def train_and_save(rank: int, world_size: int, config: RunConfig, run_uri: str, save_at: int, model: dict[str, Any]) -> list[float]:
    """Trains to config.train.steps from the beginning, and saves after step `save_at` while training goes on; the losses after it."""
    from llm.checkpoint.save import CheckpointSaver
    from llm.parallel.mesh import Mesh
    from llm.state import TrainState
    from llm.train.loop import build_engine, steps

    mesh, job = Mesh(rank, world_size, config.parallel.tensor), make_job(config, model)
    engine, losses = build_engine(job, mesh), []
    with CheckpointSaver(engine, engine_layout(config), open_store(run_uri), keep=1) as saver:
        batches = batches_from(config, mesh, 0, config.train.steps)
        for state, result, _ in steps(job, engine, batches, TrainState(), lambda before: 0, saver.wait_snapshot):
            if state.step > save_at:
                losses.append(float(result.loss))
            elif state.step == save_at:
                saver.save(state)
    return losses


def restore_and_go_on(
    rank: int, world_size: int, config: RunConfig, sources: list[str], again: str, step: int, model: dict[str, Any]
) -> list[tuple[str, list[float]]]:
    """For each run of `sources`: restores its checkpoint of `step` into a new engine, saves it again under `again`, and trains to
    config.train.steps. (Digest of what was saved again, on rank 0; the losses) of each."""
    from llm.checkpoint.digest import digest
    from llm.checkpoint.restore import restore_checkpoint
    from llm.checkpoint.save import CheckpointSaver
    from llm.parallel.mesh import Mesh
    from llm.train.loop import build_engine, steps

    mesh, found = Mesh(rank, world_size, config.parallel.tensor), []
    for number, source in enumerate(sources):
        job = make_job(config, model)
        engine = build_engine(job, mesh)
        state = restore_checkpoint(engine, step, engine_layout(config), open_store(source))
        store = open_store(f"{again}/{number}")
        with CheckpointSaver(engine, engine_layout(config), store, keep=1) as saver:
            saver.save_now(state)
        batches = batches_from(config, mesh, step, config.train.steps - step)
        losses = [float(result.loss) for _, result, _ in steps(job, engine, batches, state, lambda before: 0)]
        found.append((digest(store.open(step)) if rank == 0 else "", losses))
        engine.deepspeed.destroy()
    return found


def train_run(
    rank: int, world_size: int, config: RunConfig, run_uri: str, model: dict[str, Any], built: Callable[[], None] | None = None
) -> str:
    """`loop.train` from the newest checkpoint to config.train.steps; a hash over what this rank holds in the end: weights, moments, random
    state, ledger. `built` is called when the engine is."""
    import torch
    import torch.distributed as dist

    from llm.checkpoint.fragments import Ownership
    from llm.checkpoint.start import first_state
    from llm.parallel.mesh import Mesh
    from llm.train import loop

    mesh = Mesh(rank, world_size, config.parallel.tensor)
    start = first_state(open_store(run_uri), config)
    engines: list[Any] = []
    build = loop.build_engine

    def build_engine(*args: Any) -> Any:
        engines.append(build(*args))
        if built is not None:
            built()
        return engines[-1]

    loop.build_engine = build_engine
    try:
        end = loop.train(make_job(config, model, run_uri), mesh, _Rows(config, mesh) if mesh.tensor_rank == 0 else None, start)
    finally:
        loop.build_engine = build
    total = hashlib.sha256(end.ledger.encode() + torch.get_rng_state().numpy().tobytes())
    for fragment in Ownership(engines[0]).fragments():
        for key, value in sorted((fragment.values() | fragment.undivided()).items()):
            total.update(f"{fragment.name}|{key}".encode() + value.detach().contiguous().numpy().tobytes())
    dist.barrier()
    return total.hexdigest()


class _Rows:
    """A reader that begins where it is told, as the stream does: `offset` of the cursor is the row."""

    def __init__(self, config: RunConfig, mesh: Any) -> None:
        self._config, self._mesh = config, mesh

    def begin(self, cursor: Any) -> Any:
        config, mesh = self._config, self._mesh
        ids, segments = _rows(config, config.train.steps)
        first = cursor.offset
        for block in blocks_of(ids[first:], segments[first:], config.rank_unit_rows, mesh.data_rank, mesh.data_size):
            block["position"][:, 2] += first
            yield block


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
