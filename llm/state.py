"""What a run knows of itself between two steps. Frozen: a step takes one and gives a new one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llm.data.ledger import START
from llm.data.order import Cursor

# What cleaning counts: documents and characters, the documents that each step changed, those dropped as too short.
CLEANING: tuple[str, ...] = (
    "documents",
    "chars_in",
    "chars_out",
    "lone_surrogates",
    "fix_unicode",
    "strip_control",
    "normalize_whitespace",
    "lowercase",
    "dropped_short",
)
# What became of records: `records` = `documents` + `bad`; `documents` = those trained on + `dropped_short`.
COUNTED: tuple[str, ...] = ("records", "bad", *CLEANING)


@dataclass(frozen=True)
class TrainState:
    step: int = 0  # optimizer updates done
    tokens: int = 0  # predicted tokens so far, over all ranks: padding and masked positions not counted
    cursor: Cursor = field(default_factory=Cursor)  # the next sequence of the global order
    ledger: str = START  # the hash chain over all batches so far
    counts: Mapping[str, int] = field(default_factory=Counter)  # by COUNTED: of the windows that were begun so far

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "cursor": asdict(self.cursor),
            "ledger": self.ledger,
            "counts": dict(self.counts),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TrainState:
        cursor = data["cursor"]
        return TrainState(
            data["step"],
            data["tokens"],
            Cursor(cursor["epoch"], cursor["window"], cursor["offset"], tuple(cursor["began"])),
            data["ledger"],
            Counter(data["counts"]),
        )
