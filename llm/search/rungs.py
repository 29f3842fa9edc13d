"""Asynchronous successive halving (ASHA; Li et al. 2020, algorithm 2): every trial trains to the first rung and pauses there. Whenever a
rung has seen enough trials, the best 1 in `reduction` of them go on to the next, before any new one is begun.

A trial that pauses has ended its process, saved; one that goes on does so from there. So no token is spent beyond a rung that nobody
decided on, a sweep that was cut repeats no rung, and the trials that go on are at least those of successive halving over all of them, in
whatever order they come in. The price is a start-up for each rung that a trial goes on from.

Example: 27 trials, first_frac 1/27, reduction 3: all train a 27th of the tokens, 9 of them a 9th, 3 a third, 1 all: 4 trials' worth in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from llm.config import RunConfig
from llm.search.sweep_config import Sweep
from llm.search.trials import FAILED, Journal, Trial, tokens_after


class Rungs:
    """The scheduler `asha`. Rungs are counted in tokens, so trials of other batches are judged alike."""

    def __init__(self, sweep: Sweep) -> None:
        section, most = sweep.file.scheduler, tokens_after(sweep.base, sweep.base.train.steps)
        self._reduction, self._repeats = section.reduction, sweep.file.sweep.repeats
        self.tokens = rung_tokens(most, section.first_frac, section.reduction)

    def until_step(self, trial: Trial, config: RunConfig) -> int | None:
        """Where the trial pauses next; None where it trains to its end."""
        if trial.rung >= len(self.tokens):
            return None
        step = config.train.steps_for(self.tokens[trial.rung], config.data.seq_len)
        return step if step < config.train.steps else None

    def go_on(self, journal: Journal, arrived: set[int], all_begun: bool) -> list[int]:
        """The seeds of the setting, of those that have `arrived` at their rung, that goes on from it. Where all have been begun and all
        have arrived, the best one does even where it is fewer than 1 in `reduction`: a sweep has a winner."""
        least, trials = int(all_begun), journal.trials
        for rung in reversed(range(len(self.tokens))):
            best = promoted(trials, self.tokens[rung], self._reduction, least, self._repeats, rung)
            for setting in dict.fromkeys(number // self._repeats for number in best):
                seeds = [number for number in best if number // self._repeats == setting and trials[number].rung == rung]
                if seeds and arrived.issuperset(seeds):
                    for number in seeds:
                        journal.promote(number)
                    # A large batch may bring them over two rungs in one step: then they wait at the second without a start of their own.
                    return [n for n in seeds if not self._is_at_its_rung(trials[n])] or self.go_on(journal, arrived, all_begun)
        return []

    def _is_at_its_rung(self, trial: Trial) -> bool:
        return trial.rung < len(self.tokens) and trial.tokens >= self.tokens[trial.rung]


def rung_tokens(most: int, first_frac: float, reduction: float) -> list[int]:
    """Tokens at which trials pause, of at most so many. None so near the end that stopping there saves little.

    Example: most=1000, first_frac=0.1, reduction=3: 100, 300. The next, 900, would leave a tenth.
    """
    rungs, tokens = [], most * first_frac
    while tokens * (1 + reduction) / 2 <= most:
        rungs.append(math.ceil(tokens))
        tokens *= reduction
    return rungs


def promoted(trials: Mapping[int, Trial], tokens: int, reduction: float, least: int, repeats: int = 1, rung: int = 0) -> Sequence[int]:
    """The trials of the best 1 in `reduction` of the settings that have seen so many tokens, best first, and of at least so many settings.

    `repeats`: trials of one setting, which follow one another. It is judged by the mean of those that have not failed, once all are there,
    and they go on together: a lucky seed takes no setting further. `rung`: the one after so many tokens, where only those are judged that
    went on to it. One that a large batch has brought past it, and that waits at an earlier one, would keep others from going on.
    """
    of_setting: dict[int, list[Trial]] = {}
    for trial in trials.values():
        of_setting.setdefault(trial.number // repeats, []).append(trial)
    going = {setting: [seed for seed in seeds if seed.status != FAILED] for setting, seeds in of_setting.items()}
    whole = [setting for setting, seeds in of_setting.items() if len(seeds) == repeats and going[setting]]
    there = [setting for setting in whole if all(seed.tokens >= tokens and seed.rung >= rung for seed in going[setting])]
    ranked = sorted(there, key=lambda setting: (fmean(seed.loss_at(tokens) for seed in going[setting]), setting))
    chosen = ranked[: max(least, int(len(ranked) / reduction))]
    return [seed.number for setting in chosen for seed in going[setting]]
