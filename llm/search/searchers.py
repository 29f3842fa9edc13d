"""What proposes settings. A proposal follows from the seed, its number and the trials so far: a sweep that goes on needs no other state.

- random, grid: from the seed and the number alone.
- optuna, bohb: see llm/search/tpe.py.
- hyperopt: its TPE, through Ray Tune's wrapper, told the last losses. A failed trial is the worst that was seen.

Those that learn propose at random until they know enough.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Collection
from typing import Any

from llm.errors import ConfigError
from llm.search.space import Domain, Space, rounded
from llm.search.study import Searcher
from llm.search.sweep_config import Sweep
from llm.search.tpe import STARTUP, bohb, tpe
from llm.search.trials import FAILED, Trial

PACKAGES = {"optuna": "optuna", "bohb": "optuna", "hyperopt": "hyperopt"}


def searcher_of(sweep: Sweep) -> Searcher:
    """Raises ConfigError where the searcher's package is not installed or the space does not suit it."""
    name, space, seed = sweep.file.search.searcher, sweep.space, sweep.file.sweep.seed
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"search.searcher={name} needs a package that is not installed: pip install {package}")
    if name == "grid":
        space.in_grid(0)  # whether it can be
        return lambda number, trials: space.in_grid(number)
    learning: dict[str, Callable[[Space, int, int, Collection[Trial]], dict[str, Any] | None]] = {
        "optuna": tpe,
        "bohb": bohb,
        "hyperopt": _hyperopt,
    }

    def propose(number: int, trials: Collection[Trial]) -> dict[str, Any] | None:
        found = learning[name](space, seed, number, trials) if name in learning else None
        return found or space.draw(seed, number)

    return propose


def _hyperopt(space: Space, seed: int, number: int, trials: Collection[Trial]) -> dict[str, Any] | None:
    """A new one each time, which is given what is known as its own first proposals."""
    from ray import tune
    from ray.tune.search.hyperopt import HyperOptSearch

    losses = {trial.number: trial.loss for trial in trials if trial.status != FAILED and math.isfinite(trial.loss)}
    if len(losses) < STARTUP:
        return None
    told = [trial for trial in trials if trial.number in losses or trial.status == FAILED]

    def domain_of(domain: Domain) -> Any:
        if domain.is_continuous:
            return {"uniform": tune.uniform, "loguniform": tune.loguniform}[domain.kind](*domain.values)
        return tune.choice(domain.options())

    search = HyperOptSearch(
        space=HyperOptSearch.convert_search_space({key: domain_of(domain) for key, domain in space.domains.items()}),
        metric="eval_loss",
        mode="min",
        points_to_evaluate=[dict(trial.settings) for trial in told],
        random_state_seed=(seed * 10_007 + number) % 2**32,
    )
    for trial in told:
        search.suggest(str(trial.number))
        search.on_trial_complete(str(trial.number), {"eval_loss": losses.get(trial.number, max(losses.values()))})
    found = search.suggest("next")
    return {key: rounded(value) if isinstance(value, float) else value for key, value in found.items()} if found else None
