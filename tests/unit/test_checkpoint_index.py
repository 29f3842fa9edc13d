"""The index of a checkpoint: pieces of any layout are put together exactly, and nothing wrong in it is believed."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch

from llm.checkpoint.geometry import band, intersections
from llm.checkpoint.index import Index, Piece, SavedTensor, Undivided, merge, told
from llm.errors import DamagedCheckpointError


def cut(total: int, parts: int, rng: random.Random) -> list[tuple[int, int]]:
    """`parts` neighbouring ranges that tile [0, total): (start, size)."""
    edges = [0, *sorted(rng.sample(range(1, total), parts - 1)), total]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("seed", range(40))
def test_boxes_move_every_element_of_one_layout_to_its_place_in_another(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randint(2, 7) for _ in range(rng.randint(1, 3)))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    dim = rng.randrange(len(shape))

    def pieces() -> list[tuple[int, int, int, torch.Tensor]]:
        found = []
        for offset, size in cut(shape[dim], rng.randint(1, min(3, shape[dim])), rng):
            part = whole.narrow(dim, offset, size).reshape(-1)
            for start, numel in cut(len(part), rng.randint(1, min(4, len(part))), rng):
                found.append((offset, size, start, part[start : start + numel]))
        return found

    theirs, ours = pieces(), pieces()
    for offset, size, start, expected in ours:
        wanted = band(shape, dim, offset, size)
        wanted_boxes = list(wanted.boxes(start, start + len(expected)))
        made = torch.full_like(expected, -1)
        for there_offset, there_size, there_start, values in theirs:
            there = band(shape, dim, there_offset, there_size)
            for box in intersections(there.boxes(there_start, there_start + len(values)), wanted_boxes):
                for line, column in itertools.product(range(box.line, box.end_line), range(box.column, box.end_column)):
                    at = wanted.flat(line, column) - start
                    assert made[at] == -1, "an element came twice"
                    made[at] = values[there.flat(line, column) - there_start]
        assert made.equal(expected)


SIZES = {"rank-00000.safetensors": 2000, "rank-00001.safetensors": 2000}


def an_index() -> Index:
    """A (4, 6) matrix split by rows of 1 and 3, its second part in two pieces, and a vector of 5."""
    matrix = SavedTensor("trained", "F32", (4, 6), 0, ("weight", "exp_avg"), {"step": 3.0}, (
        Piece(0, 0, 1, 0, 6, (800, 900)), Piece(1, 1, 3, 0, 10, (800, 900)), Piece(1, 1, 3, 10, 8, (1000, 1100)),
    ))  # fmt: skip
    vector = SavedTensor("frozen", "F32", (5,), None, ("weight",), {}, (Piece(0, 0, 1, 0, 5, (1000,)),))
    rng = ({"torch": (100, 50)}, {"torch": (100, 50)})
    return Index({"matrix": matrix, "vector": vector}, (Undivided(0, 1200, (2, 3), 0, "momentum"),), rng)


def test_an_index_survives_writing_and_reading():
    assert Index.from_json(an_index().to_json(), SIZES) == an_index()


def test_rank_0_merges_what_ranks_tell():
    whole = an_index()
    by_rank = []
    for rank in range(2):
        tensors = {}
        for name, t in whole.tensors.items():
            mine = tuple(piece._replace(file=0) for piece in t.pieces if piece.file == rank)
            if mine:
                tensors[name] = SavedTensor(t.kind, t.dtype, t.shape, t.split_dim, t.keys, t.counters, mine)
        by_rank.append(told(tensors, [each for each in whole.undivided if each.file == rank], whole.rng[rank]))
    assert merge(by_rank, SIZES) == whole


def _set(path: list, value):
    def change(raw):
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value

    return change


MATRIX = ["tensors", "matrix"]


@pytest.mark.parametrize(("change", "said"), [
    (_set(["format"], 3), "format is 3"),
    (_set(["more"], 1), "exactly format"),
    (_set(["tensors"], []), "tensors is no object"),
    (_set([*MATRIX, "kind"], "other"), "is of kind 'other'"),
    (_set([*MATRIX, "dtype"], "F64"), "parameters are saved as F32"),
    (_set([*MATRIX, "dtype"], ["F32"]), "is of type"),
    (_set([*MATRIX, "shape"], [4, -6]), "no whole number"),
    (_set([*MATRIX, "shape"], [4, 6.0]), "no whole number"),
    (_set([*MATRIX, "shape"], [1 << 40, 1 << 40]), "the number of elements"),
    (_set([*MATRIX, "shape"], [4, 7]), "hold 6 elements"),
    (_set([*MATRIX, "split_dim"], 2), "split_dim"),
    (_set([*MATRIX, "split_dim"], True), "split_dim"),
    (_set([*MATRIX, "keys"], ["exp_avg", "weight"]), "the keys of matrix"),
    (_set([*MATRIX, "keys"], ["weight", "weight"]), "the keys of matrix"),
    (_set([*MATRIX, "counters"], {"step": "3"}), "step of matrix is no number"),
    (_set([*MATRIX, "pieces", 0], [0, 0, 1, 0, 6, 800]), "has not 7 values"),
    (_set([*MATRIX, "pieces", 0, 0], 2), "in the file of rank 2, of 2"),
    (_set([*MATRIX, "pieces", 0, 4], 0), "is empty"),
    (_set([*MATRIX, "pieces", 0, 4], 5), "hold 5 elements"),
    (_set([*MATRIX, "pieces", 0, 1], 1), "index 0 of dimension 0 of matrix is in no part or in two"),
    (_set([*MATRIX, "pieces", 1, 3], 1), "element 0 of a part of matrix is in no piece or in two"),
    (_set([*MATRIX, "pieces", 0, 5], 801), "no multiple of 4"),
    (_set([*MATRIX, "pieces", 0, 5], 1980), "beyond the end of rank-00000"),
    (_set([*MATRIX, "pieces", 0, 5], 896), "is in two ranges"),
    (_set([*MATRIX, "pieces", 0, 5], -4), "no whole number"),
    (_set([*MATRIX, "pieces"], []), "the parts of matrix are 0 of 4"),
    (_set(["tensors", "a|b"], {}), "is no name"),
    (_set(["tensors", "vector", "keys"], ["weight", "exp_avg"]), "is frozen, and has moments"),
    (_set(["undivided", 0, 1], 1198), "no multiple of 4"),
    (_set(["undivided", 0], 5), "five values"),
    (_set(["rng", 1], {"pickle": [0, 8]}), "random state"),
    (_set(["rng", 1, "torch"], [1500, 600]), "beyond the end of rank-00001"),
    (_set(["rng"], [{}, {}, {}]), "there is no rank-00002"),
])  # fmt: skip
def test_what_is_wrong_in_an_index_is_refused_by_name(change, said):
    raw = json.loads(an_index().to_json())
    change(raw)
    with pytest.raises(DamagedCheckpointError, match=said):
        Index.from_json(json.dumps(raw).encode(), SIZES)
