"""What proposes settings: our own random and grid search, whose proposals follow from the seed and the number, and Tune's wrappers of
Optuna (TPE) and HyperOpt, which learn from what has ended."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

from llm.errors import ConfigError
from llm.search.space import Domain, Space, rounded
from llm.search.study import Searcher
from llm.search.sweep_config import Sweep


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
    """A searcher of Tune's, told the losses as they come. What earlier commands found is given to it as its own first proposals; after
    those it draws from another random state than the first command did, which would propose the same again."""

    def __init__(self, name: str, space: Space, seed: int) -> None:
        _require_installed(name)
        self._domains = {key: _tune_domain(domain) for key, domain in space.domains.items()}
        self._name, self._seed, self._inner = name, seed, None
        self._earlier: list[tuple[dict[str, Any], float]] = []
        self._open: dict[str, str] = {}  # settings -> the id under which they were proposed

    def propose(self, number: int) -> dict[str, Any] | None:
        self._inner = self._inner or self._begun()
        found = self._inner.suggest(f"proposal-{number}")
        if not found:
            return None
        settings = {key: rounded(value) if isinstance(value, float) else value for key, value in found.items()}
        self._open[_text(settings)] = f"proposal-{number}"
        return settings

    def tell(self, settings: Mapping[str, Any], loss: float) -> None:
        if self._inner is None:
            self._earlier.append((dict(settings), loss))
        elif name := self._open.pop(_text(settings), None):  # once, where a setting has several seeds
            self._inner.on_trial_complete(name, {"eval_loss": loss})

    def _begun(self) -> Any:
        points = [settings for settings, _ in self._earlier]
        inner = _tunes(self._name, self._domains, (self._seed + len(points)) % 2**32, points)
        for i, (_, loss) in enumerate(self._earlier):
            inner.suggest(f"earlier-{i}")
            inner.on_trial_complete(f"earlier-{i}", {"eval_loss": loss})
        return inner


def _require_installed(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"search.searcher={name} needs a package that is not installed: pip install {name}")


def _tunes(name: str, domains: dict[str, Any], seed: int, points: list[dict[str, Any]]) -> Any:
    given: dict[str, Any] = {"space": domains, "metric": "eval_loss", "mode": "min", "points_to_evaluate": points or None}
    if name == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(**given, seed=seed)
    from ray.tune.search.hyperopt import HyperOptSearch

    return HyperOptSearch(**given, random_state_seed=seed)


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _tune_domain(domain: Domain) -> Any:
    from ray import tune

    if domain.kind == "uniform":
        return tune.uniform(*domain.values)
    if domain.kind == "loguniform":
        return tune.loguniform(*domain.values)
    return tune.choice(domain.options())
