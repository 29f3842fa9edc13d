"""What proposes settings. A proposal follows from the seed, its number and the trials so far: a sweep that goes on needs no other state.

- random, grid: from the seed and the number alone.
- optuna: TPE (Bergstra et al. 2011), multivariate. Trials that were stopped rank below those that finished, by how far they came.
- bohb: the model of BOHB (Falkner et al. 2018, section 4): that estimator, told the losses at the most tokens at which enough trials were
  seen, and a third of the proposals at random. With `scheduler.kind: asha` it is BOHB's asynchronous form. Optuna has the estimator; the
  package of BOHB's authors does not run beside numpy 2.
- hyperopt: its TPE, through Ray Tune's wrapper.

Those that learn take a failed trial for the worst that was seen, and propose at random until they know enough.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Callable, Collection
from typing import Any

from llm.errors import ConfigError
from llm.search.space import Domain, Space, rounded
from llm.search.study import Searcher
from llm.search.sweep_config import Sweep
from llm.search.trials import FAILED, FINISHED, RUNNING, STOPPED, Trial

STARTUP = 10  # trials that have ended before optuna and hyperopt learn from them
RANDOM_FRAC = 1 / 3  # of bohb's proposals: its paper's rho
PACKAGES = {"optuna": "optuna", "bohb": "optuna", "hyperopt": "hyperopt"}


def searcher_of(sweep: Sweep) -> Searcher:
    """Raises ConfigError where the searcher's package is not installed or the space does not suit it."""
    name, space, seed = sweep.file.search.searcher, sweep.space, sweep.file.sweep.seed
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"search.searcher={name} needs a package that is not installed: pip install {package}")
    if name == "grid":
        settings = space.whole_grid()
        return lambda number, trials: settings[number] if number < len(settings) else None
    learning: dict[str, Callable[[Space, int, int, Collection[Trial]], dict[str, Any] | None]] = {
        "optuna": _tpe,
        "bohb": _bohb,
        "hyperopt": _hyperopt,
    }

    def propose(number: int, trials: Collection[Trial]) -> dict[str, Any] | None:
        found = learning[name](space, seed, number, trials) if name in learning else None
        return found or space.draw(seed, number)

    return propose


def _tpe(space: Space, seed: int, number: int, trials: Collection[Trial]) -> dict[str, Any] | None:
    ended = [trial for trial in trials if trial.status in (FINISHED, STOPPED) and math.isfinite(trial.loss)]
    if len(ended) < STARTUP:
        return None
    from optuna.trial import TrialState

    worst = max(trial.loss for trial in ended)
    states = {FINISHED: TrialState.COMPLETE, STOPPED: TrialState.PRUNED, RUNNING: TrialState.RUNNING, FAILED: TrialState.COMPLETE}
    known = []
    for trial in trials:
        state, loss = states[trial.status], worst if trial.status == FAILED else trial.loss
        if state == TrialState.PRUNED and math.isfinite(loss):
            known.append(_known(space, trial, state, intermediate_values={trial.tokens: loss}))
        elif state == TrialState.COMPLETE:
            known.append(_known(space, trial, state, value=loss))
        elif state == TrialState.RUNNING:
            known.append(_known(space, trial, state))
    return _asked(space, seed, number, known)


def _bohb(space: Space, seed: int, number: int, trials: Collection[Trial]) -> dict[str, Any] | None:
    losses = _at_the_largest_budget(trials, len(space.domains) + 3)
    if not losses or random.Random(f"{seed} {number} bohb").random() < RANDOM_FRAC:
        return None
    from optuna.trial import TrialState

    worst = max(losses.values())
    known = []
    for trial in trials:
        if trial.number in losses or trial.status == FAILED:
            known.append(_known(space, trial, TrialState.COMPLETE, value=losses.get(trial.number, worst)))
        elif trial.status == RUNNING:
            known.append(_known(space, trial, TrialState.RUNNING))
    return _asked(space, seed, number, known)


def _at_the_largest_budget(trials: Collection[Trial], least: int) -> dict[int, float]:
    """Losses, by trial, after the most tokens at which at least so many trials have been evaluated; empty where none are."""
    at: dict[int, dict[int, float]] = {}
    for trial in trials:
        for point in trial.curve:
            if math.isfinite(point.loss) and trial.status != FAILED:
                at.setdefault(point.tokens, {})[trial.number] = point.loss
    return at[max(tokens for tokens in enough)] if (enough := [tokens for tokens in at if len(at[tokens]) >= least]) else {}


def _asked(space: Space, seed: int, number: int, known: list[Any]) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=(seed * 10_007 + number) % 2**32, multivariate=True, constant_liar=True, n_startup_trials=0)
    study = optuna.create_study(sampler=sampler)
    study.add_trials(known)
    params = study.ask(_distributions(space)).params
    return {key: _value(domain, params[key]) for key, domain in space.domains.items()}


def _known(space: Space, trial: Trial, state: Any, **told: Any) -> Any:
    from optuna.trial import create_trial

    params = {key: _param(domain, trial.settings[key]) for key, domain in space.domains.items()}
    return create_trial(state=state, params=params, distributions=_distributions(space), **told)


def _distributions(space: Space) -> dict[str, Any]:
    """Options stand for themselves by their place, so that any YAML value may be one."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key, domain in space.domains.items():
        if domain.kind in ("uniform", "loguniform"):
            found[key] = FloatDistribution(*domain.values, log=domain.kind == "loguniform")
        elif domain.kind == "quantized":
            found[key] = IntDistribution(0, len(domain.options()) - 1)
        else:
            found[key] = CategoricalDistribution(tuple(range(len(domain.options()))))
    return found


def _value(domain: Domain, param: Any) -> Any:
    return rounded(param) if domain.kind in ("uniform", "loguniform") else domain.options()[param]


def _param(domain: Domain, value: Any) -> Any:
    if domain.kind in ("uniform", "loguniform"):
        return min(max(value, domain.values[0]), domain.values[1])  # rounding may have put it a bit outside
    return domain.options().index(value)


def _hyperopt(space: Space, seed: int, number: int, trials: Collection[Trial]) -> dict[str, Any] | None:
    """A new one each time, which is given what is known as its own first proposals."""
    from ray import tune
    from ray.tune.search.hyperopt import HyperOptSearch

    ended = [trial for trial in trials if trial.status in (FINISHED, STOPPED) and math.isfinite(trial.loss)]
    if len(ended) < STARTUP:
        return None
    worst = max(trial.loss for trial in ended)
    told = [*ended, *(trial for trial in trials if trial.status == FAILED)]

    def domain_of(domain: Domain) -> Any:
        if domain.kind in ("uniform", "loguniform"):
            return {"uniform": tune.uniform, "loguniform": tune.loguniform}[domain.kind](*domain.values)
        return tune.choice(domain.options())

    search = HyperOptSearch(
        space={key: domain_of(domain) for key, domain in space.domains.items()},
        metric="eval_loss",
        mode="min",
        points_to_evaluate=[dict(trial.settings) for trial in told],
        random_state_seed=(seed * 10_007 + number) % 2**32,
    )
    for trial in told:
        search.suggest(str(trial.number))
        search.on_trial_complete(str(trial.number), {"eval_loss": worst if trial.status == FAILED else trial.loss})
    found = search.suggest("next")
    return {key: rounded(value) if isinstance(value, float) else value for key, value in found.items()} if found else None
