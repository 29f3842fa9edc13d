"""The pictures of `tune_batch` as PNG bytes: memory, speed, and what a batch size costs in time and in tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm.observe.charts import BLUE, GREEN, GREY, ORANGE, PALE_BLUE, figure_of, png_of

GIB = 1 << 30


def memory_chart(
    peaks: Mapping[int, int], failed: Sequence[int], line: tuple[float, float] | None, limit_bytes: int | None, chosen: int
) -> bytes:
    """Peak memory over the rows of a micro-batch: what was measured, the line through it (fixed, per row), what failed, the limit."""
    figure = figure_of(3.6)
    axes: Any = figure.subplots()
    sizes = sorted(peaks)
    last = max([*sizes, *failed])
    if line is not None:
        axes.plot([0, last], [line[0] / GIB, (line[0] + line[1] * last) / GIB], color=PALE_BLUE, linewidth=2, label="fixed + rows x a row")
    axes.plot(sizes, [peaks[rows] / GIB for rows in sizes], "o", color=BLUE, label="ran")
    if limit_bytes is not None:
        axes.axhline(limit_bytes / GIB, color=ORANGE, linewidth=1.5, label="limit")
        if failed:
            axes.plot(failed, [limit_bytes / GIB] * len(failed), "x", color=ORANGE, markersize=9, label="out of memory")
    axes.axvline(chosen, color=GREEN, linestyle=":", linewidth=1.5, label=f"{chosen} rows")
    axes.set_ylim(bottom=0)
    _named(axes, "rows of a micro-batch", "peak memory of a worker (GiB)")
    return png_of(figure)


def speed_chart(tokens_per_s: Mapping[int, float], by_accumulation: Mapping[int, float], chosen: int, knees: tuple[int, int]) -> bytes:
    """Tokens/s over the rows of a micro-batch on the left, over accumulation on the right, the knees marked."""
    figure = figure_of(3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, knee, label in (
        (left, tokens_per_s, knees[0], "rows of a micro-batch"),
        (right, by_accumulation, knees[1], f"micro-batches of {chosen} rows a step"),
    ):
        axes.plot(list(values), list(values.values()), "o-", color=BLUE)
        axes.axvline(knee, color=ORANGE, linestyle=":", linewidth=1.5, label=f"knee: {knee}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        _named(axes, label, "tokens/s" if axes is left else "")
    left.set_ylim(bottom=0)
    return png_of(figure)


def trade_off_chart(curve: Sequence[tuple[int, float, float]], now: tuple[int, float, float], chosen: tuple[int, float, float]) -> bytes:
    """Time to a loss over tokens to the same loss, one point a batch size: (rows, time, tokens), as multiples of the run's own."""
    figure = figure_of(4.2)
    axes: Any = figure.subplots()
    axes.plot([tokens for _, _, tokens in curve], [time for _, time, _ in curve], "o-", color=PALE_BLUE, markerfacecolor=BLUE)
    for rows, time, tokens in curve[:: max(1, len(curve) // 9)]:
        axes.annotate(f"{rows}", (tokens, time), xytext=(5, 5), textcoords="offset points", color=GREY, fontsize=9)
    axes.plot([now[2]], [now[1]], "D", color=GREY, markersize=8, label=f"now: {now[0]} rows")
    axes.plot([chosen[2]], [chosen[1]], "*", color=ORANGE, markersize=15, label=f"recommended: {chosen[0]} rows")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: "")
    _named(axes, "tokens to a loss (times now)", "time to a loss (times now)")
    return png_of(figure)


def _named(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, color=GREY)
    axes.set_ylabel(y, color=GREY)
    axes.grid(True, color="#e4e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=9)
    axes.legend(frameon=False, fontsize=9)
