"""What a sweep varies: a domain for each key of a run. Pure: values follow from the seed and the trial's number alone.

    train.lr:        {loguniform: [1.0e-4, 1.0e-2]}   any number between, each decade as likely
    train.min_lr_frac: {uniform: [0.0, 0.2]}          any number between
    train.batch_rows:  {quantized: [8, 64, 8]}        8, 16, ... 64
    parallel.zero_stage: {choice: [1, 3]}             one of these
    train.schedule:  {grid: [wsd, cosine]}            all of these: each with as many trials as the others

Every key of a run may be varied, `parallel.*` and `model.*` too: a trial has a layout of its own.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm.errors import ConfigError

KINDS = ("uniform", "loguniform", "quantized", "choice", "grid")
DIGITS = 5  # of a drawn number: what a person reads in best.yaml is what was trained
STEP_DIGITS = 12  # of a quantized one, which is as it was asked for but for the errors of sums


@dataclass(frozen=True)
class Domain:
    """`values`: low and high of uniform and loguniform; low, high and step of quantized; the options of choice and grid."""

    kind: str
    values: tuple[Any, ...]

    def draw(self, chance: random.Random) -> Any:
        if self.kind == "uniform":
            return rounded(chance.uniform(*self.values))
        if self.kind == "loguniform":
            low, high = self.values
            return rounded(math.exp(chance.uniform(math.log(low), math.log(high))))
        return chance.choice(self.options())

    def options(self) -> list[Any]:
        """All values of a domain that has so many; the ends of the others."""
        if self.kind != "quantized":
            return list(self.values)
        low, high, step = self.values
        return [rounded(low + i * step, STEP_DIGITS) for i in range(round((high - low) / step) + 1)]

    @property
    def is_continuous(self) -> bool:
        return self.kind in ("uniform", "loguniform")

    def examples(self) -> list[Any]:
        """Values to check: all of a few, the ends and some between of many."""
        options = self.options()
        if self.is_continuous:
            return [*options, *(self.draw(random.Random(number)) for number in range(3))]
        return options if self.kind != "quantized" else [options[0], options[1], options[len(options) // 2], options[-1]]


@dataclass(frozen=True)
class Space:
    domains: Mapping[str, Domain]

    def draw(self, seed: int, number: int) -> dict[str, Any]:
        """The settings of trial `number` (0, 1, ...) of a random search. Grids are gone through in turn, first key slowest."""
        chance = random.Random(f"{seed} {number}")
        grid = self._combination({key: domain.values for key, domain in self.domains.items() if domain.kind == "grid"}, number)
        return {key: grid[key] if domain.kind == "grid" else domain.draw(chance) for key, domain in self.domains.items()}

    def in_grid(self, number: int) -> dict[str, Any] | None:
        """The settings of trial `number` of a grid search, of all values; None after the last. Raises ConfigError where a domain has too
        many to count."""
        for key, domain in self.domains.items():
            if domain.is_continuous:
                raise ConfigError(
                    f"space.{key}: a grid search needs values that can be counted. Use grid, choice or quantized, not {domain.kind}."
                )
        options = {key: domain.options() for key, domain in self.domains.items()}
        return self._combination(options, number) if number < math.prod(map(len, options.values())) else None

    @staticmethod
    def _combination(options: Mapping[str, Sequence[Any]], number: int) -> dict[str, Any]:
        """One of all combinations, in turn: the last key changes from each to the next. There may be more than any memory holds."""
        found: dict[str, Any] = {}
        for key in reversed(list(options)):
            number, at = divmod(number, len(options[key]))
            found[key] = options[key][at]
        return {key: found[key] for key in options}


def parse_space(raw: Mapping[str, Any]) -> Space:
    """Raises ConfigError with every domain that is none."""
    problems, domains = [], {}
    for key, told in raw.items():
        try:
            domains[str(key)] = _domain(told)
        except ValueError as error:
            problems.append(f"  space.{key}: {error}")
    if not raw:
        problems.append("  space: it is empty. Name a key to vary, for example train.lr: {loguniform: [1.0e-4, 1.0e-2]}")
    if problems:
        raise ConfigError("\n".join(["the space cannot be searched:", *problems]))
    return Space(domains)


def _domain(told: Any) -> Domain:
    if not isinstance(told, Mapping) or len(told) != 1:
        raise ValueError(f"write one of {', '.join(KINDS)} with its values, such as {{choice: [1, 2]}}, not {str(told)[:60]!r}")
    kind, values = next(iter(told.items()))
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        raise ValueError(f"{kind!r} is no kind of domain. Legal: {', '.join(KINDS)}{f'. Nearest: {close[0]}' if close else ''}")
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{kind} takes a list of values, not {str(values)[:60]!r}")
    if kind in ("choice", "grid"):
        return Domain(kind, tuple(values))
    wanted = 3 if kind == "quantized" else 2
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)]
    if len(values) != wanted or len(numbers) != wanted:
        raise ValueError(f"{kind} takes {'low, high and step' if wanted == 3 else 'low and high'}, as numbers, not {list(values)}")
    if values[0] >= values[1]:
        raise ValueError(f"{kind}: low={values[0]} must be below high={values[1]}")
    if kind == "loguniform" and values[0] <= 0:
        raise ValueError(f"loguniform: low={values[0]} must be above 0")
    if kind == "quantized":
        steps = (values[1] - values[0]) / values[2] if values[2] > 0 else 0
        if not 1 <= steps <= 100_000 or abs(steps - round(steps)) > 1e-9:
            raise ValueError(f"quantized: step={values[2]} must lead from {values[0]} to {values[1]} in 1 to 100,000 whole steps")
    return Domain(kind, tuple(values))


def rounded(value: float, digits: int = DIGITS) -> float:
    """A drawn number as it is written down and trained with."""
    return value if isinstance(value, int) else float(f"{value:.{digits - 1}e}")
