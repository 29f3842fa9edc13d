"""Population-based training (Jaderberg et al. 2017): all trials train side by side, and every so often the worst go on from the checkpoints
of the best, with settings that differ a little. Pure: what happens follows from the seed and the losses.

All trials of a generation train to the same step and end there with a checkpoint; the next begins when the last of them has. So a sweep
that was cut goes on as if it had not been, in whatever order trials came in. The price is a start-up for each trial and generation.

Example: six trials, quantile_frac 0.25. After each generation the worst, trial 3 say, takes over from the best. Its run `0003` ends; its
next one, `0003-1`, starts from the best one's checkpoint (checkpoint.start_from), in trial 3's own layout.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from llm.config_file import MAY_DIFFER, is_below
from llm.search.space import Domain, Space, rounded
from llm.search.trials import Takeover, Trial

DRAWN_FRAC = 0.25  # of values that are drawn anew; the others change by FACTOR, or to the next option. The paper's, and Ray Tune's, values
FACTOR = 1.2


def foreign_keys(space: Space) -> list[str]:
    """The keys that a trial cannot change in the middle: weights of another shape, other data."""
    return [key for key in space.domains if not is_below(key, MAY_DIFFER)]


def boundaries(steps: int, interval: int) -> list[int]:
    """The steps at which generations end, the last one's left out. 100, 40 -> 40 80"""
    return list(range(interval, steps, interval))


def takeovers(trials: Sequence[Trial], step: int, quantile_frac: float, space: Space, seed: int) -> list[Takeover]:
    """Which trials go on from another's checkpoint of `step`, and with what settings. `trials`: those that came so far."""
    losses = {trial.number: _loss_at(trial, step) for trial in trials}
    ranked = sorted(trials, key=lambda trial: (losses[trial.number], trial.number))
    count = max(1, int(len(ranked) * quantile_frac)) if len(ranked) > 1 else 0
    found = []
    for worse in ranked[len(ranked) - count :]:
        chance = random.Random(f"{seed} {step} {worse.number}")
        better = chance.choice(ranked[:count])
        if losses[better.number] < losses[worse.number]:
            settings = {key: _changed(domain, better.settings[key], chance) for key, domain in space.domains.items()}
            found.append(Takeover(worse.number, step, better.number, better.run_name, settings))
    return found


def _loss_at(trial: Trial, step: int) -> float:
    return next((point.loss for point in trial.curve if point.step == step), math.inf)


def _changed(domain: Domain, value: Any, chance: random.Random) -> Any:
    if chance.random() < DRAWN_FRAC:
        return domain.draw(chance)
    if domain.kind in ("uniform", "loguniform"):
        low, high = domain.values
        return rounded(min(max(value * chance.choice((FACTOR, 1 / FACTOR)), low), high))
    options = domain.options()
    return options[min(max(options.index(value) + chance.choice((1, -1)), 0), len(options) - 1)]
