"""What a run knows of itself between two steps. Frozen: a step takes one and gives a new one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llm.data.order import Cursor


@dataclass(frozen=True)
class TrainState:
    step: int = 0  # optimizer updates done
    tokens: int = 0  # predicted tokens so far, over all ranks: padding and masked positions not counted
    cursor: Cursor = field(default_factory=Cursor)  # the next sequence of the global order

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> TrainState:
        return TrainState(step=data["step"], tokens=data["tokens"], cursor=Cursor(**data["cursor"]))
