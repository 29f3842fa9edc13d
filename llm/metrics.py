"""Every metric of a run: its name, unit and formula; the rows of `<run>/metrics.jsonl`, and the file's one writer.

The file is the only channel from the trainer (rank 0 writes) to the user's terminal, TensorBoard and the report, and it
outlives every process. It holds one JSON object a line, of three kinds:

    {"kind": "step", "step": 97, "loss": 3.21, "tokens": 794624, "ledger": "9f...", ...}    each step once
    {"kind": "eval", "step": 100, "eval_loss": 3.3, "perplexity": 27.1, "eval_tokens": 16384}
    {"kind": "event", "event": "checkpoint", "elapsed_s": 61.2, "step": 96, "path": "..."}

A number that is NaN or infinite is null in the file, and the row's "nonfinite" lists its name, so every line is legal
JSON. Imports neither torch nor Ray: the driver and the report read rows too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.metrics_file import FileSink, MetricsSink, MetricsTail, Row, file_reader, parse_line, read_rows
from llm.redact import cleaned

__all__ = [
    "EVENTS",
    "METRICS",
    "Metric",
    "MetricsTail",
    "MetricsWriter",
    "Row",
    "bits_per_token",
    "eval_row",
    "event_row",
    "file_reader",
    "perplexity",
    "plain_row",
    "read_rows",
    "row_problems",
    "rows_of",
    "step_row",
]

_TYPE_NAMES = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Metric:
    """One number of a row. `nullable`: null means "not known"; any metric may be null when "nonfinite" names it."""

    name: str
    unit: str
    formula: str
    kinds: tuple[str, ...] = ("step",)
    type: type[int] | type[float] = float
    at_least: float | None = 0
    at_most: float | None = None
    nullable: bool = False
    optional: bool = False


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "step",
            "steps",
            "batches done, this one included: first 1, last train.steps; an update each, but for those with an outcome",
            ("step", "eval"),
            int,
        ),
        Metric(
            "loss",
            "nats per token",
            "sum of -ln p(target) over the batch's real tokens / their number, before the update",
        ),
        Metric(
            "tokens",
            "tokens",
            "real tokens (targets that the loss counts, no padding) of steps 1..step, all data ranks",
            type=int,
        ),
        Metric("tokens_per_s", "tokens/s", "real tokens of this step, all data ranks / step_s"),
        Metric(
            "data_wait_frac",
            "fraction of step_s",
            "seconds that rank 0 waited for its next microbatch / step_s",
            at_most=1,
        ),
        Metric("lr", "learning rate", "the rate that this update used"),
        Metric("grad_norm", "L2 norm", "global norm of the gradient of loss, before clipping"),
        Metric("step_s", "s", "wall time of the step, waiting for data included, evaluation and checkpoints not"),
        Metric("mfu", "fraction of peak", "model FLOPs of the step / (step_s x peak FLOP/s of all devices)", nullable=True),
        Metric(
            "elapsed_s",
            "s",
            "wall time since the command began; from 0 again when the command is run again",
            ("step", "event"),
        ),
        Metric("epoch", "epochs", "cursor after this step: passes over the corpus that are complete", type=int),
        Metric("window", "windows", "cursor after this step: window of the epoch that the next sequence is in", type=int),
        Metric("offset", "sequences", "cursor after this step: sequences of that window that are consumed", type=int),
        Metric(
            "peak_memory_gib",
            "GiB",
            "most device memory allocated on rank 0 since the run began",
            optional=True,
            nullable=True,
        ),
        Metric("eval_loss", "nats per token", "sum of -ln p(target) over the held-out tokens / their number", ("eval",)),
        Metric("perplexity", "1", "exp(eval_loss)", ("eval",)),
        Metric("eval_tokens", "tokens", "held-out real tokens that eval_loss is the mean of", ("eval",), int),
        Metric("eval_s", "s", "wall time of the evaluation", ("eval",), optional=True),
    )
}

# What each event carries besides "event" and "elapsed_s". Others may be written; the readers here use these.
EVENTS: dict[str, str] = {
    "start": "the trainer's loop is about to begin; total_steps, precision, device, nodes: for each rank, the index of its node",
    "phase": "a part of the start-up is over; name, phase_s",
    "checkpoint": "a checkpoint is published; step, path, took_s (from the step to the publication), stall_s (training stood still for it)",
    "damaged": "a checkpoint was found damaged and set aside, and an older one taken; step, reason, path (where it is now)",
    "export": "the model is exported; path",
    "sample": "text generated by the trained model; prompt, text (which may begin with the prompt)",
    "data": "what became of the records of all windows begun so far; records, bad, and what cleaning counts",
    "slow_rank": "a rank's forward passes take much longer than the others', lastingly; rank, times (longer), step",
    "guard": "a step was bad; step, action (retried, skipped, or rolled back to a step), cause",
    "started": "the run starts from another run's checkpoint; step (updates it holds), path",
    "restart": "training goes on from a checkpoint; step (updates it holds), reason, cause, steps_redone, redone_s (their time); after "
    "a failure in one command also down_s (since the last row before it), noticed_s (the part until the failure was known), phases, number",
    "end": "the trainer is done; status (finished, or paused at train.until_step), step, error",
}

# No numbers: "ledger", the hash chain over all batches up to this step's, see llm/data/ledger.py; "outcome", what became of a batch that
# llm/train/guard.py kept from the weights.
_EXTRA_KEYS = {"kind", "nonfinite", "written_at_s", "ledger", "outcome"}


def bits_per_token(nats_per_token: float) -> float:
    """Bits per token: nats / ln 2."""
    return nats_per_token / math.log(2)


def perplexity(nats_per_token: float) -> float:
    """exp(loss); infinite where a float cannot hold it (a loss above 709.78 nats)."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def step_row(
    *,
    step: int,
    loss: float,
    tokens: int,
    tokens_per_s: float,
    data_wait_frac: float,
    lr: float,
    grad_norm: float,
    step_s: float,
    mfu: float | None,
    elapsed_s: float,
    epoch: int,
    window: int,
    offset: int,
    ledger: str,
    outcome: str = "",
    peak_memory_gib: float | None = None,
) -> Row:
    """One step's row, in the units of METRICS; a value out of its range is our own mistake (AssertionError)."""
    row: Row = {"kind": "step", "step": step, "loss": loss, "tokens": tokens, "tokens_per_s": tokens_per_s}
    row |= {"data_wait_frac": data_wait_frac, "lr": lr, "grad_norm": grad_norm, "step_s": step_s, "mfu": mfu}
    row |= {"elapsed_s": elapsed_s, "epoch": epoch, "window": window, "offset": offset, "ledger": ledger}
    if outcome:
        row["outcome"] = outcome
    if peak_memory_gib is not None:
        row["peak_memory_gib"] = peak_memory_gib
    return _checked(row)


def eval_row(*, step: int, eval_loss: float, eval_tokens: int, eval_s: float | None = None) -> Row:
    """One evaluation's row: after `step` updates, so 0 is the untrained model."""
    values = {"eval_loss": eval_loss, "perplexity": perplexity(eval_loss), "eval_tokens": eval_tokens}
    if eval_s is not None:
        values["eval_s"] = eval_s
    return _checked({"kind": "eval", "step": step, **values})


def event_row(event: str, *, elapsed_s: float, **fields: Any) -> Row:
    """Something that happened, see EVENTS. `fields` are anything JSON can hold; a path becomes text. It is kept without secrets."""
    return _checked({"kind": "event", "event": event, "elapsed_s": elapsed_s, **cleaned(fields)})


def _checked(row: Row) -> Row:
    row = plain_row(row)
    problems = row_problems(row)
    assert not problems, f"not a legal metrics row: {'; '.join(problems)}: {row}"
    return row


def row_problems(row: Mapping[str, Any]) -> list[str]:
    """What keeps `row` from being a legal line of metrics.jsonl, one text a problem; empty when it is legal."""
    kind = row.get("kind")
    if kind not in ("step", "eval", "event"):
        return [f"kind={kind!r} must be step, eval or event"]
    problems = []
    if kind == "event" and not (isinstance(row.get("event"), str) and row["event"]):
        problems.append("an event row needs the name of the event")
    expected = {name: metric for name, metric in METRICS.items() if kind in metric.kinds}
    for name, metric in expected.items():
        if name in row:
            problems += _value_problems(metric, row[name], name in (row.get("nonfinite") or ()))
        elif not metric.optional:
            problems.append(f"{name} is missing")
    if kind != "event":  # an event may carry any field
        problems += [f"{name} is not a metric of a {kind} row" for name in row if name not in expected | dict.fromkeys(_EXTRA_KEYS)]
    return problems


def _value_problems(metric: Metric, value: Any, nonfinite: bool) -> list[str]:
    if value is None:
        return [] if metric.nullable or nonfinite else [f"{metric.name} must not be null"]
    legal = (int,) if metric.type is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, legal):
        return [f"{metric.name}={value!r} must be {_TYPE_NAMES[metric.type]}"]
    if metric.at_least is not None and value < metric.at_least:
        return [f"{metric.name}={value} must be at least {metric.at_least}"]
    if metric.at_most is not None and value > metric.at_most:
        return [f"{metric.name}={value} must be at most {metric.at_most}"]
    return []


def plain_row(row: Mapping[str, Any]) -> Row:
    """`row` as plain JSON values: NaN and infinities null and named in "nonfinite", array scalars as numbers."""
    nonfinite: list[str] = list(row.get("nonfinite") or ())
    plain = {str(name): _plain(value, str(name), nonfinite) for name, value in row.items() if name != "nonfinite"}
    return plain | {"nonfinite": nonfinite} if nonfinite else plain


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)  # also numpy.float64, which is a float of another name
        nonfinite.append(name)
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}.{i}", nonfinite) for i, item in enumerate(value)]
    if hasattr(value, "item"):  # a scalar of numpy or torch
        return _plain(value.item(), name, nonfinite)
    return str(value)


class MetricsWriter:
    """Appends rows to metrics.jsonl, each one flushed: what was written survives this process. One writer: rank 0."""

    def __init__(self, path_or_sink: Path | str | MetricsSink, *, clock: Callable[[], float] = time.time) -> None:
        """Takes up an existing file, less a half-written last line. Raises StorageError where it cannot be written.

        `clock` gives each row's "written_at_s", the Unix time that TensorBoard and others show.
        """
        self._sink = FileSink(Path(path_or_sink)) if isinstance(path_or_sink, (str, Path)) else path_or_sink
        self._clock = clock
        data = self._sink.read()
        if not data.endswith(b"\n") and data:
            self._sink.replace(data[: data.rfind(b"\n") + 1])

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; NaN and infinities become null. The line ends with its newline or is not read at all."""
        self._sink.append(_line(plain_row({**row, "written_at_s": round(self._clock(), 3)})))

    def rows(self) -> list[Row]:
        """The rows that are there already."""
        return [row for line in self._sink.read().splitlines() if (row := parse_line(line)) is not None]

    def truncate_after(self, step: int) -> int:
        """Drop the step and eval rows of later steps, so that training again from `step` writes each step once.

        Event rows stay: what happened, happened. Lines that are no rows go as well. Returns the number of lines
        dropped. Example: the file ends at step 100, the checkpoint is of step 96: truncate_after(96) drops 97..100, the
        next row is 97.
        """
        lines = self._sink.read().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and _stays(parse_line(line), step)]
        if len(kept) < len(lines):
            self._sink.replace(b"".join(kept))
        return len(lines) - len(kept)

    def close(self) -> None:
        """Make the last rows durable. Raises StorageError where an upload never came through."""
        self._sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False, ensure_ascii=False, separators=(", ", ": ")).encode("utf-8", "replace") + b"\n"


def _stays(row: Row | None, step: int) -> bool:
    if row is None:
        return False
    return row["kind"] == "event" or (isinstance(row.get("step"), int) and row["step"] <= step)


def rows_of(rows: Iterable[Row], kind: str, event: str | None = None) -> list[Row]:
    """The rows of one kind, and of one event where given."""
    return [row for row in rows if row.get("kind") == kind and (event is None or row.get("event") == event)]
