"""How much of the differences in loss each key explains by itself: one-way ANOVA's epsilon squared, in 0 to 1.

Numbers are cut into quartiles, which are as good as the levels of a factor where the effect is not straight. Epsilon squared (Kelley 1935)
takes off what noise alone would explain with so few trials. Trials are compared at as many tokens as all of them have seen, so the stopped
ones count. Joint effects of two keys are in no key's share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm.search.trials import FAILED, Trial

BINS = 4


def importance(trials: Iterable[Trial], keys: Sequence[str]) -> dict[str, float]:
    """By key; empty where fewer than four trials can be compared."""
    seen = [trial for trial in trials if trial.status != FAILED and trial.curve]
    if len(seen) < BINS:
        return {}
    common = min(trial.tokens for trial in seen)
    losses = [next(point.loss for point in reversed(trial.curve) if point.tokens <= common or point is trial.curve[0]) for trial in seen]
    kept = [(trial.settings, loss) for trial, loss in zip(seen, losses, strict=True) if math.isfinite(loss)]
    return {key: _epsilon_squared(_levels([settings.get(key) for settings, _ in kept]), [loss for _, loss in kept]) for key in keys}


def _levels(values: Sequence[Any]) -> list[Any]:
    """The factor's level of each value: itself where there are few, else its quartile."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len(set(values)) <= BINS:
        return [str(value) for value in values]
    ordered = sorted(values)
    return [min(BINS - 1, ordered.index(value) * BINS // len(values)) for value in values]


def _epsilon_squared(levels: Sequence[Any], losses: Sequence[float]) -> float:
    groups: Mapping[Any, list[float]] = {level: [] for level in levels}
    for level, loss in zip(levels, losses, strict=True):
        groups[level].append(loss)
    count, mean = len(losses), sum(losses) / len(losses)
    total = sum((loss - mean) ** 2 for loss in losses)
    within = sum((loss - sum(group) / len(group)) ** 2 for group in groups.values() for loss in group)
    free = count - len(groups)
    if total <= 0 or free <= 0:
        return 0.0
    return max(0.0, (total - within - (len(groups) - 1) * within / free) / total)
