"""The numbers that sum up a run, from its metric rows alone: for the terminal's closing table and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llm.metrics import Row, bits_per_token, rows_of
from llm.observe.goodput import Goodput, goodput


@dataclass(frozen=True)
class Summary:
    """A run in numbers; None where the rows do not tell. Losses are nats per token, times seconds.

    `tokens_per_s` and `data_wait_frac` are over the summed step time, the first step left out: it also pays for
    compilation, memory pools and the first window. `dollars` are those of all commands, `dollars_per_mtok` for a million of the run's
    `tokens`. `outputs` names what the run left (checkpoint, model, report, ...) and where.
    """

    steps: int = 0
    total_steps: int | None = None
    status: str = "running"
    first_loss: float | None = None
    final_loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    tokens: int | None = None
    elapsed_s: float | None = None
    tokens_per_s: float | None = None
    data_wait_frac: float | None = None
    mfu: float | None = None
    goodput: Goodput | None = None
    dollars: float | None = None
    dollars_per_mtok: float | None = None
    restarts: int = 0
    checkpoints: int = 0
    precision: str | None = None
    error: str | None = None
    prompt: str | None = None
    sample: str | None = None
    outputs: Mapping[str, str] = field(default_factory=dict)


def summarize(rows: Sequence[Row], outputs: Mapping[str, str] | None = None, dollars_per_worker_hour: float | None = None) -> Summary:
    """Sum up a run. `outputs` adds to those that the rows tell (the last checkpoint, the exported model)."""
    rows = without_redone(rows)
    steps = rows_of(rows, "step")
    evals = [row for row in rows_of(rows, "eval") if row.get("eval_loss") is not None]
    losses = [row["loss"] for row in steps if row.get("loss") is not None]
    steady = steps[1:] or steps
    start = _last(rows, "start")
    end = _last(rows[_last_begin(rows) :], "end")
    sample = _last(rows, "sample")
    found = {"checkpoint": _last(rows, "checkpoint").get("path"), "model": _last(rows, "export").get("path")}
    last = steps[-1] if steps else {}
    times = goodput(rows)
    spent = dollars(times.worker_s, dollars_per_worker_hour)
    return Summary(
        steps=last.get("step", 0),
        total_steps=start.get("total_steps"),
        status=end.get("status", "running"),
        first_loss=losses[0] if losses else None,
        final_loss=losses[-1] if losses else None,
        eval_loss_before=evals[0]["eval_loss"] if len(evals) > 1 else None,
        eval_loss_after=evals[-1]["eval_loss"] if evals else None,
        tokens=last.get("tokens"),
        elapsed_s=_elapsed_s(rows),
        tokens_per_s=_over_time(steady, "tokens_per_s"),
        data_wait_frac=_over_time(steady, "data_wait_frac"),
        mfu=_over_time(steady, "mfu"),
        goodput=times,
        dollars=spent,
        dollars_per_mtok=dollars_per_mtok(spent, last.get("tokens")),
        restarts=len(rows_of(rows, "event", "restart")),
        checkpoints=len({row.get("step") for row in rows_of(rows, "event", "checkpoint")}),
        precision=start.get("precision"),
        error=end.get("error"),
        prompt=sample.get("prompt"),
        sample=None if "text" not in sample else sample["text"].removeprefix(sample.get("prompt") or ""),
        outputs={name: str(path) for name, path in {**found, **(outputs or {})}.items() if path},
    )


def dollars(worker_s: float, per_worker_hour: float | None) -> float | None:
    """What `worker_s` seconds of workers cost; None where the price is not known."""
    return None if per_worker_hour is None else worker_s / 3600 * per_worker_hour


def dollars_per_mtok(spent: float | None, tokens: int | None) -> float | None:
    """Dollars for a million tokens; None where one of the two is not known or there is no token yet."""
    return None if spent is None or not tokens else spent / (tokens / 1e6)


def without_redone(rows: Sequence[Row]) -> list[Row]:
    """`rows` with each step once: the step and eval rows that a later restart did again are left out, events stay.

    metrics.jsonl itself is already so; rows gathered while a run was going on are not. Example: steps 1..7, then 5, 6
    from the checkpoint of step 4 -> 1, 2, 3, 4, 5, 6.
    """
    kept: list[Row] = []
    redone_from = float("inf")
    evaluated: set[int] = set()
    for row in reversed(rows):
        if row["kind"] == "step":
            if row["step"] >= redone_from:
                continue
            redone_from = row["step"]
        elif row["kind"] == "eval":
            if row["step"] >= redone_from or row["step"] in evaluated:
                continue
            evaluated.add(row["step"])
        kept.append(row)
    return kept[::-1]


def summary_lines(summary: Summary) -> list[tuple[str, str]]:
    """(label, value) of each thing that is known, in reading order; the sample is not among them."""
    lines = [("status", summary.status + (f": {summary.error}" if summary.error else ""))]
    of = f" of {summary.total_steps:,}" if summary.total_steps else ""
    lines.append(("steps", f"{summary.steps:,}{of}"))
    if summary.final_loss is not None:
        lines.append(("final loss", f"{nats_and_bits(summary.final_loss)}  (first step {summary.first_loss:.4f})"))
    if summary.eval_loss_after is not None:
        before = "" if summary.eval_loss_before is None else f"{nats_and_bits(summary.eval_loss_before)} -> "
        lines.append(("eval loss", before + nats_and_bits(summary.eval_loss_after)))
    if summary.tokens is not None:
        lines.append(("tokens", f"{summary.tokens:,}"))
    if summary.elapsed_s is not None:
        lines.append(("time", duration(summary.elapsed_s)))
    if summary.tokens_per_s is not None:
        lines.append(("throughput", f"{summary.tokens_per_s:,.0f} tokens/s"))
    if summary.data_wait_frac is not None:
        lines.append(("waiting for data", f"{summary.data_wait_frac:.2%} of step time"))
    if summary.goodput is not None and summary.goodput.wall_s > 0:
        lost = [f"{name} {duration(s)}" for name, s in summary.goodput.parts_s.items() if name != "useful" and s >= 0.05]
        lines.append(("goodput", f"{summary.goodput.useful_frac:.1%} of the time in useful steps; the rest: {', '.join(lost) or 'none'}"))
    if summary.precision:
        lines.append(("precision", summary.precision))
    if summary.mfu is not None:
        lines.append(("MFU", f"{summary.mfu:.1%}"))
    if summary.dollars is not None:
        per_mtok = "" if summary.dollars_per_mtok is None else f", ${summary.dollars_per_mtok:,.4g} for a million tokens"
        lines.append(("cost", f"${summary.dollars:,.2f}{per_mtok}"))
    if summary.checkpoints:
        lines.append(("checkpoints", f"{summary.checkpoints} saved"))
    if summary.restarts:
        lines.append(("restarts", f"{summary.restarts}"))
    return lines + list(summary.outputs.items())


def nats_and_bits(nats_per_token: float) -> str:
    """Example: 2.0794 -> "2.0794 nats (3.000 bits) per token"."""
    return f"{nats_per_token:.4f} nats ({bits_per_token(nats_per_token):.3f} bits) per token"


def duration(seconds: float) -> str:
    """A length of time for people: "0.8 s", "42 s", "3:07 min", "5:02:11 h", "2 d 3 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, second = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{second:02d} min"
    hours, minute = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}:{minute:02d}:{second:02d} h"
    return f"{hours // 24} d {hours % 24} h"


def phase_line(row: Row) -> tuple[str, str]:
    """The name of a "phase" event and how long it took; where it does not say, when it ended: "at 12 s"."""
    name, took_s = str(row.get("name")), row.get("phase_s")
    return name, duration(took_s) if took_s is not None else f"at {duration(row.get('elapsed_s') or 0.0)}"


def printable(text: str) -> str:
    """`text` with control characters but newline and tab replaced: generated text must not steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _last(rows: Sequence[Row], event: str) -> Row:
    found = rows_of(rows, "event", event)
    return found[-1] if found else {}


def _last_begin(rows: Sequence[Row]) -> int:
    """Where the last attempt begins: an "end" before it is not the run's end any more."""
    return max((i for i, row in enumerate(rows) if row.get("event") in ("start", "restart")), default=0)


def _elapsed_s(rows: Sequence[Row]) -> float | None:
    """The time of all attempts: the clock starts at 0 again with each command."""
    before_s, last_s = 0.0, None
    for row in rows:
        if (now_s := row.get("elapsed_s")) is None:
            continue
        if last_s is not None and now_s < last_s - 1:  # rows of one attempt may be a little out of order
            before_s += last_s
        last_s = now_s
    return None if last_s is None else before_s + last_s


def _over_time(steps: Sequence[Row], name: str) -> float | None:
    """The mean of a metric over time: each step weighs as long as it took."""
    known = [(row[name], row["step_s"]) for row in steps if row.get(name) is not None and row.get("step_s") is not None]
    total_s = sum(step_s for _, step_s in known)
    return sum(value * step_s for value, step_s in known) / total_s if total_s > 0 else None
