"""How a checkpoint looks from outside: names, the index of its fragments, its manifest. Pure.

<run>/checkpoints/step-00000096/
    rank-00003.safetensors   fp32 weights and optimizer state that rank 3 owns, as 1-D fragments named `<parameter>|<key>`
    rank-00003.json          where each fragment belongs (RankIndex)
    state.json               step, tokens, cursor, layout, optimizer counters
    MANIFEST.json            every file above with the SHA-256 of its blocks (llm/checkpoint/manifest.py)
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

STATE = "state.json"
WEIGHT = "weight"  # the key of a fragment that is a part of a parameter; other keys are the optimizer's own (exp_avg, ...)

_STEP = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True)
class Layout:
    """How the engine that saved a checkpoint was laid out."""

    workers: int
    tensor: int
    zero_stage: int
    precision: str
    optimizer: str

    def differences(self, other: Layout) -> list[str]:
        mine, theirs = asdict(self), asdict(other)
        return [f"{key}={mine[key]} there, {theirs[key]} here" for key in mine if mine[key] != theirs[key]]


@dataclass(frozen=True)
class FragmentIndex:
    """Elements [start, start + numel) of the flattened tensor-parallel part of a parameter.

    `part_shape` is that part's shape, `full_shape` the parameter's; they differ in `split_dim` (None: not split).
    """

    start: int
    numel: int
    part_shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    split_dim: int | None


@dataclass(frozen=True)
class RankIndex:
    tensor_rank: int
    fragments: dict[str, FragmentIndex]  # by parameter name
    counters: dict[str, dict[str, int | float]]  # the optimizer's scalar state (AdamW's step), by number of the flat group

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> RankIndex:
        raw = json.loads(text)
        fragments = {
            name: FragmentIndex(f["start"], f["numel"], tuple(f["part_shape"]), tuple(f["full_shape"]), f["split_dim"])
            for name, f in raw["fragments"].items()
        }
        return RankIndex(raw["tensor_rank"], fragments, raw["counters"])


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: str) -> int | None:
    """The step of a published folder's name; None for temporary and foreign names."""
    found = _STEP.match(folder)
    return int(found.group(1)) if found else None


def rank_files(rank: int) -> tuple[str, str]:
    return f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"


def split_dim(part: tuple[int, ...], full: tuple[int, ...]) -> int | None:
    """The dimension in which a tensor-parallel part differs from the whole; None where they are equal."""
    dims = [i for i, (a, b) in enumerate(zip(part, full, strict=True)) if a != b]
    assert len(dims) <= 1, f"{part} is not a split of {full}"
    return dims[0] if dims else None
