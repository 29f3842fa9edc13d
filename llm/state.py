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
class History:
    """What the last steps that moved the weights showed, for the numeric guard (llm/train/guard.py). Losses in nats per token."""

    steps: int = 0
    last_loss: float = 0.0
    loss: float = 0.0  # moving mean, as the next two
    loss_change: float = 0.0  # from one step to the next, without its sign
    grad_norm: float = 0.0
    skipped: int = 0  # batches skipped since the last update
    rollbacks: int = 0
    back_to: int = 0  # the step whose weights came back, until the next update

    @property
    def sound(self) -> bool:
        """Whether the weights are those of an update that nothing was wrong with since: a place to go back to."""
        return not self.skipped and not self.back_to

    def of_other_data(self) -> History:
        """What remains of it where the data change, whose losses are other ones."""
        return History(skipped=self.skipped, rollbacks=self.rollbacks, back_to=self.back_to)


@dataclass(frozen=True)
class TrainState:
    step: int = 0  # batches done: optimizer updates, and batches that the guard skipped
    tokens: int = 0  # predicted tokens of these batches, over all ranks: padding and masked positions not counted
    cursor: Cursor = field(default_factory=Cursor)  # the next sequence of the global order
    ledger: str = START  # the hash chain over all batches so far
    counts: Mapping[str, int] = field(default_factory=Counter)  # by COUNTED: of the windows that were begun so far
    history: History = field(default_factory=History)

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "cursor": asdict(self.cursor),
            "ledger": self.ledger,
            "counts": dict(self.counts),
            "history": asdict(self.history),
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
            History(**data["history"]),
        )
