"""What `tune_batch` found, as a table, as JSON and as one page that shows the trade-off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llm.config import RunConfig
from llm.observe.page import escaped, page, picture, section, table
from llm.observe.tune_charts import memory_chart, speed_chart, trade_off_chart
from llm.train.tune.advice import Advice, Batch
from llm.train.tune.collect import Measured
from llm.train.tune.memory_model import MAX_PROBES, fit_line
from llm.train.tune.noise_scale import NoiseScale, StepNorms

GIB = 1 << 30
BUSY_FRAC = 0.1
_READING = (
    "Each point is a batch size, in rows: to the left fewer tokens, down less time (and, on hardware of a fixed size, less cost). The "
    "noise scale was measured early in training and grows as the loss falls: later, larger batches pay. A larger batch wants a larger "
    "learning rate."
)


@dataclass(frozen=True)
class Findings:
    config: RunConfig
    hardware: str
    measured: Measured
    advice: Advice
    noise: NoiseScale | None
    norms: Sequence[StepNorms]
    tokens_a_row: float  # that the loss is over

    @property
    def settings(self) -> list[str]:
        """The recommendation, as arguments of --set."""
        found = [f"train.microbatch_rows={self.advice.batch.microbatch_rows}"]
        if self.advice.batch.rows != self.config.train.batch_rows:
            found.insert(0, f"train.batch_rows={self.advice.batch.rows}")
        return found


def summary_table(found: Findings) -> list[tuple[str, str]]:
    """(what, figure) by line."""
    search, advice = found.measured.search, found.advice
    limit = f" of {search.limit_bytes / GIB:.2f} GiB" if search.limit_bytes else ""
    line = fit_line(search.peaks)
    rates = ", ".join(f"{rows}: {rate:,.0f}" for rows, rate in advice.tokens_per_s.items())
    failed = ", ".join(map(str, sorted(search.failed))) or "none"
    lines = [
        ("hardware, layout", f"{found.hardware}; {_layout(found.config)}"),
        ("largest micro-batch that fits", f"{search.largest} rows: {search.peaks[search.largest or 0] / GIB:.2f} GiB{limit}"),
        ("the next larger one", _next_larger(found)),
        ("probes", f"{search.probes} of {MAX_PROBES} groups of processes; ran out of memory: {failed}"),
        ("tokens/s by micro-batch", rates + _busy(found)),
        ("95% of the most tokens/s", f"from {advice.microbatch_knee} rows a micro-batch on, and {advice.accumulation_knee} of them a step"),
        (f"micro-batch for a batch of {advice.now.rows}", f"{advice.now.microbatch_rows} rows: {advice.now.tokens_per_s:,.0f} tokens/s"),
    ]
    if line is not None:
        told = f"{line.fixed_bytes / GIB:.2f} GiB + {line.bytes_per_row / 2**20:.1f} MiB a row"
        lines.insert(3, ("memory of a worker", told))
    return [*lines, *_noise_lines(found)]


def recommendation(found: Findings) -> str:
    """One line: what to set, what it brings, how sure that is."""
    batch = found.advice.batch
    brings = f"{batch.tokens_per_s:,.0f} tokens/s"
    if found.advice.critical_rows is not None and batch.rows != found.advice.now.rows:
        brings += f", {batch.time:.2f} times the time and {batch.tokens:.2f} times the tokens to the same loss"
    sets = " ".join(f"--set {setting}" for setting in found.settings)
    return f"{sets}   ({'; '.join(filter(None, (brings, found.advice.why, found.advice.how_sure)))})"


def as_json(found: Findings) -> dict[str, Any]:
    search, speed, advice = found.measured.search, found.measured.speed, found.advice
    line = fit_line(search.peaks)
    told = {
        "run": found.config.run.name,
        "hardware": found.hardware,
        "parallel": found.config.parallel.model_dump(),
        "limit_bytes": search.limit_bytes,
        "largest_rows": search.largest,
        "largest_is_exact": search.exact,
        "usable_rows": found.measured.usable_rows,
        "microbatch_rows": advice.now.microbatch_rows,
        "peak_bytes": search.peaks,
        "out_of_memory": search.failed,
        "memory_line": asdict(line) if line else None,
        "probes": [{"sizes": task.climb, "timed": task.time} for task in found.measured.tasks],
        "tokens_per_s": advice.tokens_per_s,
        "tokens_per_s_by_accumulation": advice.by_accumulation,
        "microbatch_knee_rows": advice.microbatch_knee,
        "accumulation_knee": advice.accumulation_knee,
        "microbatch_s": speed.microbatch_s if speed else None,
        "update_s": speed.update_s if speed else None,
        "timings_spread_frac": speed.spread_frac if speed else None,
        "noise_scale": {**asdict(found.noise), "tokens_a_row": found.tokens_a_row} if found.noise else None,
        "critical_batch_rows": advice.critical_rows,
        "at_critical_batch": asdict(advice.at_critical) if advice.at_critical else None,
        "recommendation": {"set": found.settings, **asdict(advice.batch), "why": advice.why, "how_sure": advice.how_sure},
        "now": asdict(advice.now),
        "curve": [asdict(batch) for batch in advice.curve],
        "gradient_norms": [asdict(norms) for norms in found.norms],
    }
    return _finite(told)


def as_page(found: Findings) -> str:
    search, advice, line = found.measured.search, found.advice, fit_line(found.measured.search.peaks)
    memory = memory_chart(
        search.peaks,
        sorted(search.failed),
        (line.fixed_bytes, line.bytes_per_row) if line else None,
        search.limit_bytes,
        advice.now.microbatch_rows,
    )
    speed = speed_chart(
        advice.tokens_per_s, advice.by_accumulation, advice.now.microbatch_rows, (advice.microbatch_knee, advice.accumulation_knee)
    )
    parts = [section("Recommendation", f"<pre>{escaped(recommendation(found))}</pre>" + table(summary_table(found)))]
    if advice.curve:
        chart = trade_off_chart([_point(batch) for batch in advice.curve], _point(advice.now), _point(advice.batch))
        parts.append(
            section("Time to a loss, and tokens to it", picture(chart, "time over tokens, by batch size") + f"<p>{escaped(_READING)}</p>")
        )
    parts.append(section("Memory", picture(memory, "peak memory over the rows of a micro-batch, with the limit")))
    parts.append(section("Speed", picture(speed, "tokens per second over micro-batch and accumulation")))
    if search.failed:
        parts.append(section("Out of memory", table([(f"{rows} rows", told) for rows, told in sorted(search.failed.items())])))
    return page(f"{found.config.run.name}: batch size", parts)


def _noise_lines(found: Findings) -> list[tuple[str, str]]:
    noise = found.noise
    if noise is None:
        return [("critical batch size", "not measured")]
    a_row = found.tokens_a_row
    rows = [f"{tokens / a_row:,.3g}" for tokens in (noise.tokens, noise.low_tokens, noise.high_tokens)]
    tokens = [f"{tokens:,.0f}" for tokens in (noise.tokens, noise.low_tokens, noise.high_tokens)]
    of = f"{noise.confidence:.0%} interval"
    return [
        ("critical batch size, rows", f"{rows[0]} ({of}: {rows[1]} to {rows[2]}), from {noise.steps} steps"),
        ("critical batch size, tokens", f"{tokens[0]} ({of}: {tokens[1]} to {tokens[2]})"),
        *_at_critical(found),
    ]


def _at_critical(found: Findings) -> list[tuple[str, str]]:
    batch = found.advice.at_critical
    if batch is None:
        return []
    told = f"{batch.rows} rows: {batch.time:.2f} times the time and {batch.tokens:.2f} times the tokens of now, on this hardware"
    return [("a batch of that size", f"{told}; up to it more data ranks pay")]


def _busy(found: Findings) -> str:
    spread = found.measured.speed.spread_frac if found.measured.speed else 0.0
    return f" (a busy machine: timings of one step spread by {spread:.0%})" if spread > BUSY_FRAC else ""


def _next_larger(found: Findings) -> str:
    search = found.measured.search
    larger = next((rows for rows in search.legal if rows > (search.largest or 0)), None)
    if larger is None:
        return "none: a data rank has no more rows in a step"
    if larger in search.failed:
        return f"{larger} rows ran out of memory"
    line = fit_line(search.peaks)
    return f"{larger} rows: not tried" + (f", the line says {line.at(larger) / GIB:.2f} GiB" if line else "")


def _layout(config: RunConfig) -> str:
    parallel = config.parallel
    offload = "" if parallel.offload == "none" else f", offload {parallel.offload}"
    return f"{parallel.workers} workers = data {parallel.data_size} x tensor {parallel.tensor}, ZeRO {parallel.zero_stage}{offload}"


def _point(batch: Batch) -> tuple[int, float, float]:
    return batch.rows, batch.time, batch.tokens


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
