"""The pictures of a run as PNG bytes, by matplotlib's Agg backend: no display, no global state, no window.

Apart from report.py so that the page and the drawing stay small. matplotlib is imported inside the functions: it takes
seconds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm.metrics import Row, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, PALE_BLUE, ORANGE, GREEN, PALE_GREEN, GREY = "#1a5fb4", "#a9c7ea", "#d9480f", "#2b7a4b", "#a8d5ba", "#52606d"
MAX_POINTS = 4000  # more than a picture has columns
DPI = 150


def loss_chart(rows: Sequence[Row], title: str) -> bytes:
    """Training loss over steps (raw, and smoothed where there are many steps), with the evaluations as points."""
    figure = figure_of(4.6)
    axes: Any = figure.subplots()
    steps, losses = _series(rows_of(rows, "step"), "loss")
    smooth = smoothed(losses)
    if len(steps) >= 50:
        axes.plot(*_thin(steps, losses), color=PALE_BLUE, linewidth=0.9, label="training loss")
        axes.plot(*_thin(steps, smooth), color=BLUE, linewidth=2, label="training loss, smoothed")
    elif steps:
        marker = "o" if len(steps) < 20 else None
        axes.plot(steps, losses, color=BLUE, linewidth=2, marker=marker, markersize=4, label="training loss")
    eval_steps, eval_losses = _series(rows_of(rows, "eval"), "eval_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_losses, color=ORANGE, linestyle="", marker="D", markersize=6, zorder=4, label="eval loss")
        _label_ends(axes, eval_steps, eval_losses)
    _mark_restarts(axes, rows)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color="#1f2933")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    if steps or eval_steps:
        axes.legend(frameon=False, loc="upper right")
    _finish(axes)
    return png_of(figure)


def throughput_chart(rows: Sequence[Row]) -> bytes:
    """Tokens per second above, and below it the fraction of each step spent waiting for data, over the same steps."""
    figure = figure_of(5.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    all_steps = rows_of(rows, "step")
    for axes, name, line, pale, label in (
        (upper, "tokens_per_s", BLUE, PALE_BLUE, "tokens/s"),
        (lower, "data_wait_frac", GREEN, PALE_GREEN, "waiting for data\n(fraction of step time)"),
    ):
        steps, values = _series(all_steps, name)
        if len(steps) >= 50:
            axes.plot(*_thin(steps, values), color=pale, linewidth=0.9)
            axes.plot(*_thin(steps, smoothed(values)), color=line, linewidth=2)
        else:
            axes.plot(steps, values, color=line, linewidth=2)
        axes.set_ylabel(label)
        _mark_restarts(axes, rows)
        _finish(axes)
        axes.set_ylim(bottom=0)
    waits = [value for value in _series(all_steps, "data_wait_frac")[1] if math.isfinite(value)]
    lower.set_ylim(0, min(1.0, max([0.05, *(1.15 * value for value in waits)])))
    upper.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    lower.set_xlabel("step")
    figure.align_ylabels()
    return png_of(figure)


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean over about a thirtieth of the values around each one, so the curve neither lags nor moves the ends.

    Towards the ends the stretch shrinks, equally on both sides. NaN is left out of the means and stays NaN itself.
    """
    half_width = max(1, len(values) // 60)
    sums, counts = [0.0], [0]
    for value in values:
        known = math.isfinite(value)
        sums.append(sums[-1] + (value if known else 0.0))
        counts.append(counts[-1] + known)
    result = []
    for i, value in enumerate(values):
        half = min(half_width, i, len(values) - 1 - i)
        begin, end = i - half, i + half + 1
        mean = (sums[end] - sums[begin]) / max(1, counts[end] - counts[begin])
        result.append(mean if math.isfinite(value) else math.nan)
    return result


def _series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values; a null is NaN, which matplotlib shows as a gap."""
    return [row["step"] for row in rows], [math.nan if row.get(name) is None else row[name] for row in rows]


def _thin(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most MAX_POINTS of them, spikes kept: of each stretch the smallest and the largest value."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    stretch = math.ceil(2 * len(steps) / MAX_POINTS)
    chosen: list[int] = []
    for begin in range(0, len(steps), stretch):
        known = [i for i in range(begin, min(begin + stretch, len(steps))) if not math.isnan(values[i])]
        ends = {min(known, key=values.__getitem__), max(known, key=values.__getitem__)} if known else {begin}
        chosen += sorted(ends)
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def _label_ends(axes: Axes, steps: list[int], losses: list[float]) -> None:
    """The first and the last evaluation's numbers beside their points."""
    known = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    for i in sorted({*known[:1], *known[-1:]}):
        before = len(known) > 1 and i == known[-1]
        offset, align = ((-8, 8), "right") if before else ((9, -3), "left")
        axes.annotate(
            f"{losses[i]:.3f}",
            (steps[i], losses[i]),
            xytext=offset,
            textcoords="offset points",
            ha=align,
            color=ORANGE,
            fontsize=10,
        )


def _mark_restarts(axes: Axes, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows_of(rows, "event", "restart")):
        if isinstance(row.get("step"), int):
            label = "restart" if number == 0 else None
            axes.axvline(row["step"] + 0.5, color=GREY, linestyle=":", linewidth=1.2, zorder=1, label=label)


def figure_of(height_inches: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height_inches), dpi=DPI, facecolor="white", layout="constrained")


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="#e4e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.015)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b8c2cc")
    axes.tick_params(colors=GREY, labelsize=10)
    axes.xaxis.label.set(color=GREY, fontsize=10.5)
    axes.yaxis.label.set(color=GREY, fontsize=10.5)


def png_of(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
