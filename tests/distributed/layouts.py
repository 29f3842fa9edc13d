"""Runs a layout for real, without Ray: gloo processes forked from one that has torch, DeepSpeed and transformers imported already.

`run_layout` trains a tiny model for a few steps on given rows and returns each step's loss and gradient norm. Rows come in blocks, exactly
as Ray Data would deal them to the data ranks, so the path from block to update is the product's own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm.config import RunConfig
from llm.data.order import Cursor
from llm.state import COUNTED
from tests.ports import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preload"])
VOCAB = 96
TIMEOUT_S = 300


@dataclass
class Result:
    losses: list[float]
    grad_norms: list[float]
    extra: dict[str, Any] = field(default_factory=dict)


def make_config(**sections: dict[str, Any]) -> RunConfig:
    """A run of 20 steps x 8 rows of 16 tokens; each keyword updates a section."""
    base: dict[str, dict[str, Any]] = {
        "run": {"name": "layout"},
        "model": {"preset": "llama_1m"},
        "data": {"seq_len": 16, "sources": [{"name": "made", "uri": "/none"}]},
        "parallel": {"workers": 1, "tensor": 1, "zero_stage": 1},
        "train": {"steps": 20, "batch_rows": 8, "lr": 1e-2, "warmup_steps": 4, "precision": "fp32", "grad_clip": 1.0},
        "eval": {"rows": 0},
        "export": {"enabled": False},
    }
    for name, changes in sections.items():
        base[name] = {**base.get(name, {}), **changes}
    return RunConfig.model_validate(base)


def llama(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        **changes,
    }


def unequal_rows(num_rows: int, seq_len: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(ids, segments) whose rows predict very different numbers of tokens: some are nearly all padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCAB, (num_rows, seq_len + 1), dtype=np.int32)
    ids[:, 1::2] = ids[:, ::2][:, : ids[:, 1::2].shape[1]]  # something to learn: every second token repeats
    lengths = rng.choice([2, 5, seq_len // 2, seq_len + 1], num_rows)
    place = np.arange(seq_len + 1)[None]
    cut = rng.integers(1, seq_len, num_rows)[:, None]
    segments = np.where(place < lengths[:, None], 1 + (place >= cut), 0).astype(np.int32)
    return ids, segments


def blocks_of(ids: np.ndarray, segments: np.ndarray, unit_rows: int, data_rank: int, data_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Block j of unit_rows rows goes to data rank j mod data_size."""
    for first in range(data_rank * unit_rows, len(ids), unit_rows * data_size):
        rows = slice(first, first + unit_rows)
        position = np.stack([np.zeros(unit_rows), np.zeros(unit_rows), np.arange(first, first + unit_rows)], axis=1)
        nothing = np.zeros((unit_rows, len(COUNTED)), dtype=np.int64)
        yield {
            "ids": ids[rows],
            "segments": segments[rows],
            "position": position.astype(np.int64),
            "counts": nothing,
        }


@dataclass
class Given:
    """A reader of blocks that are there already."""

    blocks: Iterator[dict[str, np.ndarray]]

    def begin(self, cursor: Cursor) -> Iterator[dict[str, np.ndarray]]:
        return self.blocks


def run_ranks(target: Any, world_size: int, *args: Any) -> list[Any]:
    """`target(rank, world_size, *args)` in one process a rank, under one gloo group; what each returned. An error in one ends all."""
    with tempfile.TemporaryDirectory() as scratch:
        port = free_port()
        answers = [CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            CONTEXT.Process(target=_rank_main, args=(answers[rank][1], target, rank, world_size, port, scratch, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for _, sender in answers:
            sender.close()
        results: list[Any] = []
        try:
            for rank, (receiver, _) in enumerate(answers):
                if not receiver.poll(TIMEOUT_S):
                    raise TimeoutError(f"rank {rank} of {world_size} gave no answer in {TIMEOUT_S} s")
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} of {world_size} died without a word") from None
                if kind == "error":
                    raise value if isinstance(value, Exception) else RuntimeError(f"rank {rank}: {value}")
                results.append(value)
        finally:
            for process in processes:
                process.join(5 if len(results) == world_size else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
        return results


def _rank_main(sender: Any, target: Any, rank: int, world_size: int, port: int, scratch: str, args: tuple[Any, ...]) -> None:
    log = Path(scratch) / f"rank-{rank}.log"
    quiet = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import torch
    import torch.distributed as dist

    from llm.errors import HeadraceError

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        dist.init_process_group("gloo")
        sender.send(("value", target(rank, world_size, *args)))
    except HeadraceError as error:
        sender.send(("error", error))
    except BaseException:
        sender.send(("error", f"{traceback.format_exc()}\n{log.read_text()[-2000:]}"))
        sys.stdout.flush()
    finally:
        sender.close()
        os._exit(0)  # peers of a failed rank wait in collectives for ever


def run_layout(config: RunConfig, model_config: dict[str, Any], seed: int = 0) -> Result:
    """Trains on `unequal_rows`; the losses and gradient norms of each step, which all ranks agree on."""
    results = run_ranks(train_rank, config.parallel.workers, config, model_config, seed)
    for other in results[1:]:
        assert other.losses == results[0].losses, "ranks disagree on the loss"
    return results[0]


def make_job(config: RunConfig, model_config: dict[str, Any], run_uri: str = "/none") -> Any:
    from llm.data.order import Schedule
    from llm.data.pack import no_rows
    from llm.job import Job
    from llm.tokenizer import Tokenizer

    tokenizer = Tokenizer("none", VOCAB, 0, "<eos>", {})
    return Job(config, run_uri, model_config, tokenizer, no_rows(config.data.seq_len), Schedule(), 0.0)


def train_rank(rank: int, world_size: int, config: RunConfig, model_config: dict[str, Any], seed: int) -> Result:
    from llm.parallel.mesh import Mesh
    from llm.state import TrainState
    from llm.train.loop import build_engine, fetch_batches, steps

    mesh = Mesh(rank, world_size, config.parallel.tensor)
    job = make_job(config, model_config)
    engine = build_engine(job, mesh)
    ids, segments = unequal_rows(config.train.rows_before(config.train.steps), config.data.seq_len, seed)
    reader = None if mesh.tensor_rank else Given(blocks_of(ids, segments, config.rank_unit_rows, mesh.data_rank, mesh.data_size))
    batches = fetch_batches(job, mesh, reader, TrainState(), config.train.steps)
    losses, norms, last = [], [], TrainState()
    for state, result, _ in steps(job, engine, batches, last, lambda before: 0):
        last = state
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
    return Result(losses, norms, {"tokens": last.tokens, "cursor": last.cursor, "ledger": last.ledger})
