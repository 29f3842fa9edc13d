"""The pictures of a sweep as PNG bytes. matplotlib is imported inside the functions: it takes seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llm.observe.charts import BLUE, GREY, ORANGE, figure_of, finish_axes, png_of
from llm.search.trials import FAILED, FINISHED, Trial

_FAINT = "#c3ccd5"


def curves_chart(trials: Sequence[Trial], best: int | None) -> bytes:
    """Every trial's evaluation loss over tokens: the best thick, stopped ones grey with a mark where they ended."""
    figure = figure_of(4.6)
    axes: Any = figure.subplots()
    for trial in trials:
        tokens, losses = [point.tokens for point in trial.curve], [point.loss for point in trial.curve]
        if not tokens:
            continue
        style = {"color": ORANGE, "linewidth": 2.5, "zorder": 4} if trial.number == best else {"color": BLUE, "linewidth": 1.2}
        if trial.number != best and trial.status != FINISHED:
            style = {"color": GREY, "linewidth": 1.0}
        axes.plot(tokens, losses, **style, label="best" if trial.number == best else None)
        if trial.status != FINISHED:
            axes.plot(tokens[-1:], losses[-1:], color=GREY, marker="x", linestyle="", zorder=3)
    axes.set_xlabel("tokens")
    axes.set_ylabel("evaluation loss (nats per token)")
    axes.legend(frameon=False, loc="upper right") if best is not None else None
    finish_axes(axes)
    return png_of(figure)


def parallel_chart(trials: Sequence[Trial], keys: Sequence[str], best: int | None) -> bytes:
    """Parallel coordinates: a line for each trial through its settings to its loss. Each axis is scaled to its own range, in logarithms
    where that spans more than a decade."""
    shown = [trial for trial in trials if trial.curve and trial.status != FAILED]
    figure = figure_of(4.2)
    axes: Any = figure.subplots()
    columns = [*keys, "loss"]
    places = {key: _places([_value(trial, key) for trial in shown]) for key in columns}
    for i, trial in enumerate(shown):
        style = (
            {"color": ORANGE, "linewidth": 2.5, "zorder": 4} if trial.number == best else {"color": BLUE, "linewidth": 1.0, "alpha": 0.6}
        )
        axes.plot(range(len(columns)), [places[key][i] for key in columns], **style)
    for x, key in enumerate(columns):
        axes.axvline(x, color=_FAINT, linewidth=1)
        values = [_value(trial, key) for trial in shown]
        for value, y in (
            {str(v): (v, place) for v, place in zip(values, places[key], strict=True)}.values()
            if len(set(map(str, values))) <= 8
            else _ends(values)
        ):
            axes.annotate(
                f"{value:.4g}" if isinstance(value, float) else str(value),
                (x, y),
                fontsize=8,
                color=GREY,
                xytext=(3, 2),
                textcoords="offset points",
            )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks([])
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return png_of(figure)


def importance_chart(shares: Mapping[str, float]) -> bytes:
    """The share of the loss's variance that each key explains by itself."""
    figure = figure_of(0.8 + 0.4 * len(shares))
    axes: Any = figure.subplots()
    keys = sorted(shares, key=lambda key: shares[key])
    axes.barh(keys, [shares[key] for key in keys], color=BLUE)
    axes.set_xlim(0, 1)
    finish_axes(axes)
    return png_of(figure)


def _value(trial: Trial, key: str) -> Any:
    return trial.loss if key == "loss" else trial.settings.get(key)


def _places(values: Sequence[Any]) -> list[float]:
    """Each value's height in 0 to 1."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        names = sorted({str(value) for value in values})
        return [names.index(str(value)) / max(1, len(names) - 1) for value in values]
    numbers = [float(value) for value in values]
    if numbers and min(numbers) > 0 and max(numbers) > 10 * min(numbers):
        numbers = [math.log(number) for number in numbers]
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    return [(number - low) / (high - low) if high > low else 0.5 for number in numbers]


def _ends(values: Sequence[Any]) -> list[tuple[Any, float]]:
    return [(min(values), 0.0), (max(values), 1.0)]
