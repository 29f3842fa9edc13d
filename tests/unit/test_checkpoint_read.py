"""Reading saved tensors: any layout out of any other, only the blocks that are needed, each once."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm.checkpoint import read
from llm.checkpoint.index import Index, Piece, SavedTensor
from llm.checkpoint.layout import rank_file
from llm.checkpoint.read import Target, fill, read_whole
from llm.errors import CheckpointError
from tests.unit.test_checkpoint_index import cut

BLOCK = 64


class Files:
    """What `fill` asks of a published checkpoint. Counts the reads of each block."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self._contents = contents
        self.files = {name: SimpleNamespace(size_bytes=len(data)) for name, data in contents.items()}
        self.reads: list[tuple[str, int]] = []

    def read_range(self, name: str, start: int, stop: int) -> bytearray:
        assert start % BLOCK == 0 and stop == min(start + BLOCK, len(self._contents[name])), "not one whole block"
        self.reads.append((name, start))
        return bytearray(self._contents[name][start:stop])


def saved(rng: random.Random, num_ranks: int = 3) -> tuple[dict[tuple[str, str], torch.Tensor], Index, Files]:
    """Tensors of random shapes, cut at random, in files with gaps."""
    whole, tensors = {}, {}
    contents = [bytearray(rng.randbytes(8 * rng.randint(1, 9))) for _ in range(num_ranks)]
    for number in range(6):
        shape = tuple(rng.randint(2, 9) for _ in range(rng.randint(1, 3)))
        dim = rng.choice([None, *range(len(shape))])
        keys = ("weight", "exp_avg") if number % 2 else ("weight",)
        values = {key: torch.randn(shape) for key in keys}
        pieces = []
        parts = [(0, 1)] if dim is None else cut(shape[dim], rng.randint(1, 2), rng)
        for offset, size in parts:
            part = {key: v if dim is None else v.narrow(dim, offset, size) for key, v in values.items()}
            numel = part["weight"].numel()
            for start, count in cut(numel, rng.randint(1, min(3, numel)), rng):
                file, begins = rng.randrange(num_ranks), []
                for key in keys:
                    begins.append(len(contents[file]))
                    contents[file] += part[key].reshape(-1)[start : start + count].numpy().tobytes()
                pieces.append(Piece(file, offset, size, start, count, tuple(begins)))
        tensors[f"t{number}"] = SavedTensor("trained", "F32", shape, dim, keys, {}, tuple(pieces))
        whole |= {(f"t{number}", key): value for key, value in values.items()}
    files = {rank_file(rank): bytes(data) for rank, data in enumerate(contents)}
    index = Index(tensors, (), ({},) * num_ranks)
    return whole, Index.from_json(index.to_json(), {name: len(data) for name, data in files.items()}), Files(files)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BLOCK_BYTES", BLOCK)


@pytest.mark.parametrize("seed", range(30))
def test_any_layout_is_read_out_of_any_other_and_no_block_twice(seed):
    rng = random.Random(seed)
    whole, index, files = saved(rng)
    targets, expected = [], []
    for (name, key), value in whole.items():
        dim = index.tensors[name].split_dim
        dim = rng.randrange(value.dim()) if dim is None else rng.choice([None, dim])
        offset, size = (0, 1) if dim is None else rng.choice(cut(value.shape[dim], min(2, value.shape[dim]), rng))
        part = value.reshape(-1) if dim is None else value.narrow(dim, offset, size).reshape(-1)
        start, count = rng.choice(cut(len(part), min(2, len(part)), rng))
        memory = torch.full((count + 7,), float("nan"))
        targets.append(Target(name, key, dim, offset, size, start, memory[3 : 3 + count]))
        expected.append((memory, part[start : start + count]))
    fill(files, index, targets)  # pyright: ignore[reportArgumentType]
    for memory, values in expected:
        assert memory[3:-4].equal(values)
        assert memory[:3].isnan().all() and memory[-4:].isnan().all(), "written beside the target"
    assert len(set(files.reads)) == len(files.reads)


def test_only_the_blocks_of_what_is_wanted_are_read():
    values = torch.arange(4096, dtype=torch.float32)
    piece = Piece(0, 0, 1, 0, 4096, (64,))
    index = Index({"w": SavedTensor("trained", "F32", (4096,), None, ("weight",), {}, (piece,))}, (), ({},))
    files = Files({rank_file(0): bytes(64) + values.numpy().tobytes()})
    target = torch.empty(20)
    fill(files, index, [Target("w", "weight", None, 0, 1, 1000, target)])  # pyright: ignore[reportArgumentType]
    assert target.equal(values[1000:1020])
    assert files.reads == [(rank_file(0), 4032), (rank_file(0), 4096)]  # bytes 64 + 4000 to 64 + 4080


def test_whole_tensors_come_in_the_order_of_their_names_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(read, "_TOGETHER_BYTES", 400)
    whole, index, files = saved(random.Random(0))
    found: list[Any] = list(read_whole(files, index))  # pyright: ignore[reportArgumentType]
    assert [(name, key) for name, key, _ in found] == sorted(whole)
    assert all(value.equal(whole[name, key]) for name, key, value in found)
    assert [name for name, _, _ in read_whole(files, index, ("exp_avg",))] == ["t1", "t3", "t5"]  # pyright: ignore[reportArgumentType]


def test_what_is_not_there_and_another_split_are_refused_by_name():
    _, index, files = saved(random.Random(1))
    with pytest.raises(CheckpointError, match="holds no exp_avg of t0"):
        fill(files, index, [Target("t0", "exp_avg", None, 0, 1, 0, torch.empty(1))])  # pyright: ignore[reportArgumentType]
    name = next(name for name, t in index.tensors.items() if t.split_dim == 0 and len(t.shape) > 1)
    with pytest.raises(CheckpointError, match="was split in dimension 0, and is split in 1 here"):
        fill(files, index, [Target(name, "weight", 1, 0, 1, 0, torch.empty(1))])  # pyright: ignore[reportArgumentType]
