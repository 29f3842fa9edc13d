"""Tree-structured Parzen estimators, of Optuna: proposals that learn from the trials so far, and follow from them and the seed alone.

- `tpe` (Bergstra et al. 2011), multivariate. Trials that have not finished rank below those that have, by how far they came.
- `bohb`: as the model of BOHB (Falkner et al. 2018, section 4), that estimator, told the losses at the most tokens at which enough trials
  were seen, and a third of the proposals at random. Unlike there, trials that did not come so far count as worse: with none of them known,
  the estimator goes looking where they were. With `scheduler.kind: asha` it is BOHB's asynchronous form. The package of its authors does
  not run beside numpy 2.

Both take a failed trial for the worst that was seen, and propose nothing until they know enough.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping
from typing import Any

from llm.search.space import Domain, Space, rounded
from llm.search.trials import FAILED, FINISHED, Trial, at_most_tokens

STARTUP = 10  # trials that have been evaluated before tpe learns from them
RANDOM_FRAC = 1 / 3  # of bohb's proposals: its paper's rho


def tpe(space: Space, seed: int, number: int, trials: Collection[Trial]) -> dict[str, Any] | None:
    seen = [trial.loss for trial in trials if trial.status != FAILED and math.isfinite(trial.loss)]
    if len(seen) < STARTUP:
        return None
    return _proposed(space, seed, number, trials, {trial.number: trial.loss for trial in trials if trial.status == FINISHED}, max(seen))


def bohb(space: Space, seed: int, number: int, trials: Collection[Trial]) -> dict[str, Any] | None:
    losses = at_most_tokens(trials, least=len(space.domains) + 3)
    if not losses or random.Random(f"{seed} {number} bohb").random() < RANDOM_FRAC:
        return None
    return _proposed(space, seed, number, trials, losses, max(losses.values()))


def _proposed(space: Space, seed: int, number: int, trials: Collection[Trial], losses: Mapping[int, float], worst: float) -> dict[str, Any]:
    """`losses`, by trial, are what the estimator goes by; failed trials count as `worst`. All others rank below, by how far they came, and
    those that have shown nothing yet keep proposals away from themselves."""
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=(seed * 10_007 + number) % 2**32, multivariate=True, constant_liar=True, n_startup_trials=0)
    study, distributions = optuna.create_study(sampler=sampler), _distributions(space)
    for trial in trials:
        if trial.number in losses or trial.status == FAILED:
            told: dict[str, Any] = {"state": TrialState.COMPLETE, "value": losses.get(trial.number, worst)}
        elif math.isfinite(trial.loss):
            told = {"state": TrialState.PRUNED, "intermediate_values": {trial.tokens: trial.loss}}
        else:
            told = {"state": TrialState.RUNNING}
        params = {key: _param(domain, trial.settings[key]) for key, domain in space.domains.items()}
        study.add_trial(create_trial(**told, params=params, distributions=distributions))
    params = study.ask(distributions).params
    return {key: _value(domain, params[key]) for key, domain in space.domains.items()}


def _distributions(space: Space) -> dict[str, Any]:
    """Options stand for themselves by their place, so that any YAML value may be one."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key, domain in space.domains.items():
        if domain.is_continuous:
            found[key] = FloatDistribution(*domain.values, log=domain.kind == "loguniform")
        elif domain.kind == "quantized":
            found[key] = IntDistribution(0, len(domain.options()) - 1)
        else:
            found[key] = CategoricalDistribution(tuple(range(len(domain.options()))))
    return found


def _value(domain: Domain, param: Any) -> Any:
    return rounded(param) if domain.is_continuous else domain.options()[param]


def _param(domain: Domain, value: Any) -> Any:
    if domain.is_continuous:
        return min(max(value, domain.values[0]), domain.values[1])  # rounding may have put it a bit outside
    return domain.options().index(value)
