"""What proposes settings: our own random and grid search, whose proposals follow from the seed and the number, and Tune's wrappers of
Optuna (TPE) and HyperOpt, which learn from what has ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm.errors import ConfigError
from llm.search.space import Domain, Space
from llm.search.study import Searcher
from llm.search.sweep_config import Sweep

PACKAGES = {"optuna": "optuna", "hyperopt": "hyperopt"}


def searcher_of(sweep: Sweep) -> Searcher:
    """Raises ConfigError where the searcher's package is not installed or the space does not suit it."""
    name, space, seed = sweep.file.search.searcher, sweep.space, sweep.file.sweep.seed
    if name == "random":
        return _Random(space, seed)
    if name == "grid":
        return _Grid(space)
    return _Learning(name, space, seed)


class _Random:
    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def propose(self, number: int) -> dict[str, Any]:
        return self._space.draw(self._seed, number)

    def tell(self, settings: Mapping[str, Any], loss: float) -> None: ...


class _Grid:
    def __init__(self, space: Space) -> None:
        self._settings = space.whole_grid()

    def propose(self, number: int) -> dict[str, Any] | None:
        return self._settings[number] if number < len(self._settings) else None

    def tell(self, settings: Mapping[str, Any], loss: float) -> None: ...


class _Learning:
    """A searcher of Tune's, told the losses as they come. Its random state begins anew with each command."""

    def __init__(self, name: str, space: Space, seed: int) -> None:
        domains = {key: _tune_domain(domain) for key, domain in space.domains.items()}
        try:
            self._inner = _tunes(name, domains, seed)
        except (ImportError, AssertionError) as error:
            raise ConfigError(
                f"search.searcher={name} needs a package that is not installed ({error}): pip install {PACKAGES[name]}"
            ) from None
        self._number = 0

    def propose(self, number: int) -> dict[str, Any] | None:
        found = self._inner.suggest(f"proposal-{number}")
        return dict(found) if isinstance(found, Mapping) else None

    def tell(self, settings: Mapping[str, Any], loss: float) -> None:
        self._inner.add_evaluated_point(dict(settings), loss)


def _tunes(name: str, domains: dict[str, Any], seed: int) -> Any:
    if name == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(space=domains, metric="eval_loss", mode="min", seed=seed % 2**32)
    from ray.tune.search.hyperopt import HyperOptSearch

    return HyperOptSearch(space=domains, metric="eval_loss", mode="min", random_state_seed=seed % 2**32)


def _tune_domain(domain: Domain) -> Any:
    from ray import tune

    if domain.kind == "uniform":
        return tune.uniform(*domain.values)
    if domain.kind == "loguniform":
        return tune.loguniform(*domain.values)
    return tune.choice(domain.options())
