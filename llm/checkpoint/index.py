"""index.json: which bytes of which file are which elements of which tensor. Pure; nothing in it is believed before it is checked.

One file for the whole checkpoint, written by rank 0 from what the ranks tell it: 512 ranks that restore read it once each, not 512 files
each. Numbers only, one row a piece: 350,000 pieces (70 B parameters at ZeRO 3 on 512 ranks) are about 20 MB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from llm.checkpoint.geometry import lines_and_columns
from llm.checkpoint.layout import rank_file
from llm.checkpoint.strict_json import strict_json
from llm.errors import CheckpointError, DamagedCheckpointError

INDEX = "index.json"
FORMAT = 2
WEIGHT = "weight"  # the key of a tensor's own values; the other keys are the optimizer's own (exp_avg, ...)
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
KINDS = ("trained", "frozen", "buffer")

MAX_NUMEL = 1 << 48
Counters = dict[str, int | float]


class Piece(NamedTuple):
    """Elements [start, start + numel) of a flattened part, the part being [part_offset, part_offset + part_size) of the split dimension.

    `begins[k]`: the byte of rank `file`'s file at which the values of the tensor's key k begin.
    """

    file: int
    part_offset: int
    part_size: int
    start: int
    numel: int
    begins: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    """A parameter with its moments, or a buffer. A tensor that is not split has one part, of offset 0 and size 1."""

    kind: str
    dtype: str  # of parameters and moments always F32
    shape: tuple[int, ...]
    split_dim: int | None
    keys: tuple[str, ...]
    counters: Counters  # the optimizer's numbers of it, such as AdamW's step
    pieces: tuple[Piece, ...]


class Undivided(NamedTuple):
    """Optimizer state of a rank's flat group that is not laid out as the group is, such as Muon's momentum: for the same layout only."""

    file: int
    begin: int
    shape: tuple[int, ...]
    group: int
    key: str


@dataclass(frozen=True)
class Index:
    """`rng[rank]`: where the rank's random states are, by name: (first byte, bytes)."""

    tensors: Mapping[str, SavedTensor]
    undivided: tuple[Undivided, ...]
    rng: tuple[Mapping[str, tuple[int, int]], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.rng)

    def to_json(self) -> bytes:
        tensors = {
            name: {
                "kind": t.kind,
                "dtype": t.dtype,
                "shape": t.shape,
                "split_dim": t.split_dim,
                "keys": t.keys,
                "counters": t.counters,
                "pieces": [(*piece[:5], *piece.begins) for piece in t.pieces],
            }
            for name, t in self.tensors.items()
        }
        raw = {"format": FORMAT, "tensors": tensors, "undivided": self.undivided, "rng": self.rng}
        return json.dumps(raw, separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes, sizes: Mapping[str, int]) -> Index:
        """A checked index of files with these sizes in bytes. Raises DamagedCheckpointError where anything in it is not as it must be: a
        type, a range outside its file, bytes used twice, an element of a tensor that is there twice or not at all."""
        try:
            index = _read(strict_json(data, INDEX))
            _check_files(index, sizes)
            for name, tensor in index.tensors.items():
                _check_coverage(name, tensor)
            return index
        except _WrongError as error:
            raise DamagedCheckpointError(f"{INDEX} of the checkpoint is wrong: {error}.") from None


def told(tensors: Mapping[str, SavedTensor], undivided: Iterable[Undivided], rng: Mapping[str, tuple[int, int]]) -> bytes:
    """What one rank tells rank 0 of its file; `file` in it is of no meaning yet."""
    return Index(tensors, tuple(undivided), (rng,)).to_json()


def merge(by_rank: list[bytes], sizes: Mapping[str, int]) -> Index:
    """The checkpoint's index from what each rank told, in rank order, checked as a reader will check it: what could not be restored is
    not published. Raises CheckpointError."""
    tensors: dict[str, SavedTensor] = {}
    undivided: list[Undivided] = []
    rng: list[Mapping[str, tuple[int, int]]] = []
    for rank, data in enumerate(by_rank):
        one = _read(json.loads(data))
        rng += one.rng
        undivided += [each._replace(file=rank) for each in one.undivided]
        for name, tensor in one.tensors.items():
            here = tuple(piece._replace(file=rank) for piece in tensor.pieces)
            before = tensors.get(name)
            if before is not None and _about(before) != _about(tensor):
                raise CheckpointError(f"ranks disagree on {name}: {_about(before)} and {_about(tensor)}.")
            kept = before.pieces if before else ()
            tensors[name] = SavedTensor(*_about(tensor), kept + here)
    return Index.from_json(Index(tensors, tuple(undivided), tuple(rng)).to_json(), sizes)


def _about(tensor: SavedTensor) -> tuple[str, str, tuple[int, ...], int | None, tuple[str, ...], Counters]:
    return tensor.kind, tensor.dtype, tensor.shape, tensor.split_dim, tensor.keys, tensor.counters


class _WrongError(Exception):
    pass


def _require(holds: bool, told: str) -> None:
    if not holds:
        raise _WrongError(told)


def _int(value: Any, what: str, low: int = 0, high: int = MAX_NUMEL) -> int:
    _require(type(value) is int and low <= value <= high, f"{what}={str(value)[:30]} is no whole number from {low} to {high}")
    return value


def _ints(value: Any, what: str) -> tuple[int, ...]:
    _require(isinstance(value, list) and len(value) <= 64, f"{what} is no short list of numbers")
    return tuple(_int(each, what) for each in value)


def _name(value: Any, what: str) -> str:
    _require(isinstance(value, str) and 0 < len(value) <= 1000 and "|" not in value, f"{what}={str(value)[:100]!r} is no name")
    return value


def _dict(value: Any, what: str) -> dict[str, Any]:
    _require(isinstance(value, dict), f"{what} is no object")
    return value


def _list(value: Any, what: str) -> list[Any]:
    _require(isinstance(value, list), f"{what} is no list")
    return value


def _read(raw: Any) -> Index:
    raw = _dict(raw, "it")
    _require(set(raw) == {"format", "tensors", "undivided", "rng"}, "it must have exactly format, tensors, undivided and rng")
    _require(raw["format"] == FORMAT, f"its format is {str(raw['format'])[:20]}, and this Headrace reads {FORMAT}")
    tensors = {
        _name(name, "a tensor's name"): _read_tensor(name, _dict(each, name)) for name, each in _dict(raw["tensors"], "tensors").items()
    }
    undivided = []
    for row in _list(raw["undivided"], "undivided"):
        _require(isinstance(row, list) and len(row) == 5, "a row of undivided has not five values")
        shape = _ints(row[2], "a shape")
        _int(prod(shape), "a number of elements", 1)
        undivided.append(Undivided(_int(row[0], "a file"), _int(row[1], "a byte"), shape, _int(row[3], "a group"), _name(row[4], "a key")))
    rng = []
    for each in _list(raw["rng"], "rng"):
        ranges = {name: _ints(where, "a random state") for name, where in _dict(each, "rng").items()}
        _require(set(ranges) <= {"torch", "cuda"} and all(len(where) == 2 for where in ranges.values()), "a random state is wrong")
        rng.append({name: (where[0], where[1]) for name, where in ranges.items()})
    return Index(tensors, tuple(undivided), tuple(rng))


def _read_tensor(name: str, raw: dict[str, Any]) -> SavedTensor:
    known = {"kind", "dtype", "shape", "split_dim", "keys", "counters", "pieces"}
    _require(set(raw) == known, f"{name} must have exactly {', '.join(sorted(known))}")
    kind, dtype, shape, split = raw["kind"], raw["dtype"], _ints(raw["shape"], f"the shape of {name}"), raw["split_dim"]
    _require(kind in KINDS, f"{name} is of kind {str(kind)[:20]!r}")
    _require(isinstance(dtype, str) and dtype in ITEM_BYTES, f"{name} is of type {str(dtype)[:20]!r}")
    _require(dtype == "F32" or kind == "buffer", f"{name} is {dtype}, and parameters are saved as F32")
    _int(prod(shape), f"the number of elements of {name}")
    if split is not None:
        _int(split, f"split_dim of {name}", 0, len(shape) - 1)
    keys = tuple(_name(key, f"a key of {name}") for key in _list(raw["keys"], f"keys of {name}"))
    _require(keys[:1] == (WEIGHT,) and len(set(keys)) == len(keys) <= 16, f"the keys of {name} are not {WEIGHT} and others, each once")
    _require(kind == "trained" or keys == (WEIGHT,), f"{name} is {kind}, and has moments")
    counters = _dict(raw["counters"], f"counters of {name}")
    for key, value in counters.items():
        _name(key, f"a counter of {name}")
        _require(type(value) in (int, float), f"{key} of {name} is no number")
    pieces = []
    for row in _list(raw["pieces"], f"pieces of {name}"):
        _require(isinstance(row, list) and len(row) == 5 + len(keys), f"a piece of {name} has not {5 + len(keys)} values")
        file, offset, size, start, numel, *begins = (_int(value, f"a value of a piece of {name}") for value in row)
        _require(numel > 0, f"a piece of {name} is empty")
        pieces.append(Piece(file, offset, size, start, numel, tuple(begins)))
    return SavedTensor(kind, dtype, shape, split, keys, counters, tuple(pieces))


def _check_files(index: Index, sizes: Mapping[str, int]) -> None:
    """Every range lies in a file that the checkpoint has, on a multiple of its items' size, and no byte is in two ranges."""
    ranges: list[list[tuple[int, int]]] = []
    for rank in range(index.num_ranks):
        _require(rank_file(rank) in sizes, f"it is of {index.num_ranks} ranks, and there is no {rank_file(rank)}")
        ranges.append(list(index.rng[rank].values()))
    uses = [
        (file, begin, numel * ITEM_BYTES[tensor.dtype], ITEM_BYTES[tensor.dtype], name)
        for name, tensor in index.tensors.items()
        for file, _, _, _, numel, begins in tensor.pieces
        for begin in begins
    ]
    uses += [(each.file, each.begin, prod(each.shape) * 4, 4, each.key) for each in index.undivided]
    for file, begin, num_bytes, item_bytes, name in uses:
        _require(file < index.num_ranks, f"a piece of {name} is in the file of rank {file}, of {index.num_ranks}")
        _require(begin % item_bytes == 0, f"a piece of {name} begins at byte {begin}, no multiple of {item_bytes}")
        ranges[file].append((begin, num_bytes))
    for rank, used in enumerate(ranges):
        used.sort()
        ends = [(begin, begin + num_bytes) for begin, num_bytes in used]
        _require(not ends or ends[-1][1] <= sizes[rank_file(rank)], f"a range goes beyond the end of {rank_file(rank)}")
        for (_, end), (begin, _) in pairwise(ends):
            _require(end <= begin, f"byte {begin} of {rank_file(rank)} is in two ranges")


def _check_coverage(name: str, tensor: SavedTensor) -> None:
    """The parts tile the split dimension, and the pieces tile each part."""
    lines, size, columns = lines_and_columns(tensor.shape, tensor.split_dim)
    if not lines * size * columns:
        return _require(not tensor.pieces, f"{name} has no elements, and pieces")
    parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for piece in tensor.pieces:
        parts.setdefault((piece.part_offset, piece.part_size), []).append((piece.start, piece.numel))
    at = 0
    for (offset, part_size), pieces in sorted(parts.items()):
        _require(offset == at, f"index {min(at, offset)} of dimension {tensor.split_dim} of {name} is in no part or in two")
        at += part_size
        done = 0
        for start, numel in sorted(pieces):
            _require(start == done, f"element {min(done, start)} of a part of {name} is in no piece or in two")
            done += numel
        _require(done == lines * part_size * columns, f"the pieces of a part of {name} hold {done} elements")
    _require(at == size, f"the parts of {name} are {at} of {size} in dimension {tensor.split_dim}")
