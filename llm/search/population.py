"""Population-based training (Jaderberg et al. 2017): all trials train side by side, and every so often the worst go on from the checkpoints
of the best, with settings that differ a little. What happens follows from the seed and the losses.

All trials of a generation train to the same step and end there with a checkpoint; the next begins when the last of them has. So a sweep
that was cut goes on as if it had not been, in whatever order trials came in. The price is a start-up for each trial and generation.

Example: six trials, quantile_frac 0.25. After each generation the worst, trial 3 say, takes over from the best. Its run `0003` ends; its
next one, `0003-1`, starts from the best one's checkpoint (checkpoint.start_from), in trial 3's own layout.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from llm.config import RunConfig
from llm.search.space import Domain, Space, rounded
from llm.search.sweep_config import Sweep
from llm.search.trials import RUNNING, Journal, Takeover, Trial

DRAWN_FRAC = 0.25  # of values that are drawn anew; the others change by FACTOR, or to the next option. The paper's, and Ray Tune's, values
FACTOR = 1.2


class Population:
    """The scheduler `pbt`."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._ends = boundaries(sweep.base.train.steps, sweep.steps_between(sweep.base))

    def until_step(self, trial: Trial, config: RunConfig) -> int | None:
        """The end of the trial's generation; None in the last."""
        return self._ends[trial.rung] if trial.rung < len(self._ends) else None

    def go_on(self, journal: Journal, arrived: set[int], all_begun: bool) -> list[int]:
        """All trials, where all have been begun and all that have not failed have come to the end of the generation."""
        going = [trial for trial in journal.trials.values() if trial.status == RUNNING]
        if not all_begun or not going or any(trial.number not in arrived for trial in going):
            return []
        file, step = self._sweep.file, self.until_step(going[0], self._sweep.base)
        assert step is not None, "what has come to the last step has finished"
        journal.generation(step, takeovers(going, step, file.scheduler.quantile_frac, self._sweep.space, file.sweep.seed))
        return [trial.number for trial in going]


def boundaries(steps: int, interval: int) -> list[int]:
    """The steps at which generations end, the last one's left out. 100, 40 -> 40 80"""
    return list(range(interval, steps, interval))


def takeovers(trials: Sequence[Trial], step: int, quantile_frac: float, space: Space, seed: int) -> list[Takeover]:
    """Which trials go on from another's checkpoint of `step`, and with what settings. `trials`: those that have come there."""
    ranked = sorted(trials, key=lambda trial: (trial.loss, trial.number))
    count = max(1, int(len(ranked) * quantile_frac)) if len(ranked) > 1 else 0
    found = []
    for worse in ranked[len(ranked) - count :]:
        chance = random.Random(f"{seed} {step} {worse.number}")
        better = chance.choice(ranked[:count])
        if better.loss < worse.loss:
            settings = {key: _changed(domain, better.settings[key], chance) for key, domain in space.domains.items()}
            found.append(Takeover(worse.number, step, better.number, better.run_name, settings))
    return found


def _changed(domain: Domain, value: Any, chance: random.Random) -> Any:
    if chance.random() < DRAWN_FRAC:
        return domain.draw(chance)
    if domain.is_continuous:
        low, high = domain.values
        return rounded(min(max(value * chance.choice((FACTOR, 1 / FACTOR)), low), high))
    options = domain.options()
    return options[min(max(options.index(value) + chance.choice((1, -1)), 0), len(options) - 1)]
