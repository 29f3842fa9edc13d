"""From a step back to the documents: what a run was trained on, recomputed from its configuration, and held against its ledger.

Everything is read anew: what the token cache holds proves nothing about the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llm.config import RunConfig, S3Section
from llm.config_file import parse_run
from llm.data.corpus import PlannedStream, plan_stream, with_builtin_corpus
from llm.data.identity import stream_differences
from llm.data.ledger import START, advanced, row_digests
from llm.data.order import Cursor, Schedule
from llm.data.pack import COLUMN, DOCUMENT, LENGTH, OFFSET
from llm.data.window import Packed, make_window
from llm.errors import ConfigError
from llm.metrics import MetricsTail, Row, rows_of
from llm.storage import exists, is_s3, join, local_path, read_bytes
from llm.tokenizer import load_tokenizer

CONFIG, METRICS = "config.yaml", "metrics.jsonl"


@dataclass(frozen=True)
class Piece:
    """Tokens [column, column + length) of a row of the batch: those from `offset` on of the document at `position` of `uri`."""

    row: int
    column: int
    length: int
    uri: str
    position: int  # as in `llm.data.records.Document`
    offset: int


@dataclass(frozen=True)
class StepTrace:
    step: int
    begins: Cursor
    pieces: tuple[Piece, ...]
    ledger: str  # what the corpus gives now
    recorded: str  # what the run wrote
    outcome: str  # what became of the batch, where it was not trained on

    @property
    def verified(self) -> bool:
        return self.ledger == self.recorded


class TracedRun:
    """A run's record and the stream that its configuration describes now."""

    def __init__(self, run_uri: str, s3: S3Section) -> None:
        self.uri = run_uri.rstrip("/") if is_s3(run_uri) else local_path(run_uri)
        if not exists(join(self.uri, CONFIG), s3) or not exists(join(self.uri, METRICS), s3):
            raise ConfigError(f"{self.uri} is no run: it has no {CONFIG} and {METRICS}. Name the folder of one, such as runs/NAME.")
        storage, _, name = self.uri.rpartition("/")
        config = parse_run(read_bytes(join(self.uri, CONFIG), s3).decode(), join(self.uri, CONFIG))
        here = config.run.model_copy(update={"storage": storage, "name": name})  # the folder may have been moved
        self.config: RunConfig = with_builtin_corpus(config.model_copy(update={"run": here}))
        data = read_bytes(join(self.uri, METRICS), self.config.s3)
        self.steps: Mapping[int, Row] = {row["step"]: row for row in rows_of(MetricsTail(lambda offset: data[offset:]).poll(), "step")}
        if not self.steps:
            raise ConfigError(f"{self.uri} has no step yet: there is nothing to trace.")
        tokenizer = load_tokenizer(self.config.tokenizer.path, self.config.tokenizer.eos, self.config.s3)
        self.stream: PlannedStream = plan_stream(self.config, tokenizer)
        self._window: tuple[tuple[int, int, tuple[int, ...]], Packed] | None = None

    @property
    def last_step(self) -> int:
        return max(self.steps)

    def differences(self) -> list[str]:
        """What of the corpus and the tokenizer is no longer what the run was started with."""
        return stream_differences(self.uri, self.stream.files, self.stream.recipe.tokenizer.fingerprint, self.config.s3)

    def trace(self, step: int) -> StepTrace:
        """The documents of step `step` (1, 2, ...). Raises ConfigError for a step that the run has not done."""
        if step not in self.steps:
            raise ConfigError(f"{self.uri} has no step {step}. Legal: 1 to {self.last_step}.")
        before = self.steps.get(step - 1)
        begins = cursor_before(self.steps, self.stream.recipe.plan.schedule, step)
        pieces: list[Piece] = []
        digests: list[np.ndarray] = []
        for window, rows in self._rows(begins, self.config.train.rows_at(step - 1)):
            taken = window.rows.taken(rows)
            digests.append(row_digests(taken.ids, taken.segments()))
            first = sum(map(len, digests)) - len(rows)
            for piece in taken.pieces:
                uri, position = window.documents.of(int(piece[DOCUMENT]))
                pieces.append(Piece(first + int(piece[0]), int(piece[COLUMN]), int(piece[LENGTH]), uri, position, int(piece[OFFSET])))
        row = self.steps[step]
        outcome = row.get("outcome", "")
        ledger = advanced(before["ledger"] if before else START, np.concatenate(digests), outcome)
        return StepTrace(step, begins, tuple(pieces), ledger, row["ledger"], outcome)

    def first_unverified(self) -> StepTrace | None:
        """The first step that the corpus no longer gives as the run recorded it."""
        return next((trace for step in sorted(self.steps) if not (trace := self.trace(step)).verified), None)

    def first_difference(self, other: TracedRun) -> int | None:
        """The first step at which the two runs' ledgers part; None where they agree as far as both go."""
        return next((s for s in sorted(self.steps) if s in other.steps and self.steps[s]["ledger"] != other.steps[s]["ledger"]), None)

    def _rows(self, cursor: Cursor, num_rows: int) -> Iterator[tuple[Packed, np.ndarray]]:
        """(window, numbers of its rows) of the next rows from the cursor on."""
        number, skip = 0, cursor.offset
        while num_rows:
            epoch, index = self.stream.recipe.plan.nth_window(cursor, number)
            window = self._made(epoch, index, cursor.began)
            rows = np.arange(skip, min(len(window.rows), skip + num_rows))
            num_rows -= len(rows)
            if len(rows):
                yield window, rows
            number, skip = number + 1, max(0, skip - len(window.rows))

    def _made(self, epoch: int, index: int, began: tuple[int, ...]) -> Packed:
        key = (epoch, index, began)
        if self._window is None or self._window[0] != key:
            self._window = key, make_window(self.stream.recipe, epoch, index, began)
        return self._window[1]


def cursor_before(steps: Mapping[int, Row], schedule: Schedule, step: int) -> Cursor:
    """The cursor with which step `step` (1, 2, ...) begins, from the recorded rows: those where stages began, and the one before."""
    cursor = Cursor()
    for done in (*schedule.from_steps[1:], step - 1):
        if 0 < done < step:
            row = steps.get(done)
            if row is None:
                raise ConfigError(f"metrics.jsonl has no row of step {done}, which step {step} cannot be traced without.")
            cursor = Cursor(row["epoch"], row["window"], row["offset"], cursor.began)
        if done < step:
            cursor = schedule.at_step(cursor, done)
    return cursor
