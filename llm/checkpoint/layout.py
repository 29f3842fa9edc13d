"""How a checkpoint looks from outside: names, the index of its fragments, its manifest. Pure.

<run>/checkpoints/step-00000096/
    rank-00003.safetensors   fp32 weights and optimizer state that rank 3 owns, as 1-D fragments named `<parameter>|<key>`
    index.json               which bytes of which file are which elements of which tensor (llm/checkpoint/index.py)
    state.json               step, tokens, cursor, ledger, layout, loss scale
    MANIFEST.json            every file above with the SHA-256 of its blocks (llm/checkpoint/manifest.py)
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

STATE = "state.json"

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


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: str) -> int | None:
    """The step of a published folder's name; None for temporary and foreign names."""
    found = _STEP.match(folder)
    return int(found.group(1)) if found else None


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
