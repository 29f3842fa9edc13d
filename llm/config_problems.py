"""Everything that is wrong with the raw values of a run, at once: each key with its rule and the nearest legal value.

Pydantic finds most of it; this file tells it as a person would, and adds what pydantic lets pass: true for 1, infinity.
It reads no files: that is `llm/config_file.py`, and apart from it so that both stay short.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from llm.config import RunConfig
from llm.config_fields import (
    KINDS,
    as_number,
    bare_types,
    expected,
    item_section_of,
    legal_value,
    nearest_values,
    section_of,
    shown,
)
from llm.config_rules import cross_checks
from llm.config_section import Section
from llm.redact import credential_in

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    path: KeyPath
    text: str


def checked(raw: dict[Any, Any]) -> tuple[RunConfig | None, list[Problem]]:
    """The run that `raw` describes, or None and everything that is wrong with it, in the order of the sections.

    The rules between keys are checked even where single keys are bad: those are set aside, and only what is wrong
    whatever they turn out to be is told.
    """
    config, data, search = _each_key(raw)
    if config is None or search.problems:
        across = _certain_cross_checks(data, search.doubtful)
    else:
        across = cross_checks(config)
    secret = dict(_credentials(raw, ()))
    # Other rules tell parts of a value: of one with a credential they say nothing.
    problems = [problem for problem in search.problems if problem.path not in secret]
    problems += [Problem(path, _credential(path, what)) for path, what in secret.items()]
    hidden = {dotted(path) for path in secret}
    for key, text in across:
        if key in hidden:
            continue
        problems.append(Problem(tuple(key.split(".")), text if key in text else f"{key}: {text}"))
    rank = {name: i for i, name in enumerate(RunConfig.model_fields)}
    problems.sort(key=lambda problem: rank.get(str(problem.path[0]), -1))
    return (None if problems else config), problems


def bad_values(raw: dict[Any, Any]) -> list[str]:
    """What is wrong with keys and values of a run each by itself, whatever the others are."""
    _, _, search = _each_key(raw)
    secret = {path: _credential(path, what) for path, what in _credentials(raw, ())}
    return [*secret.values(), *(problem.text for problem in search.problems if problem.path not in secret)]


def _each_key(raw: dict[Any, Any]) -> tuple[RunConfig | None, dict[str, Any], _Search]:
    """The run, if each of its values is legal by itself; what is known of the values; what is wrong with them."""
    search = _Search([], [])
    data = search.known_keys(RunConfig, raw, ())
    try:
        return RunConfig.model_validate(data), data, search
    except ValidationError as error:
        search.take_out_bad_values(error, data)
    return None, data, search


def _credentials(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Where the raw values hold a URI with a credential in it, and what that is."""
    if isinstance(value, str) and (what := credential_in(value)):
        yield path, what
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in below:
        yield from _credentials(inner, (*path, name))


def _credential(path: KeyPath, what: str) -> str:
    of_mlflow = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    names = of_mlflow if "mlflow_uri" in path else ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return (
        f"{dotted(path)} holds {what}: a run's configuration is recorded with it, and a cluster shows it. Take that out, and set "
        f"{' and '.join(names)} where the job runs"
    )


def dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


@dataclass
class _Search:
    problems: list[Problem]
    doubtful: list[KeyPath]  # keys whose value nobody knows yet: bad, missing, or perhaps meant by an unknown key

    def known_keys(self, section: type[Section], raw: Any, path: KeyPath) -> dict[str, Any]:
        """A copy of `raw` with every section present and without what no section knows or no user can mean."""
        if not isinstance(raw, dict):
            if raw is not None:  # `checkpoint:` with all its keys commented out is an empty section
                keys = ", ".join(section.model_fields)
                self._tell(path, f"{dotted(path)}={shown(raw)} must be a section, a mapping of {keys}")
                self._doubt(path)
            raw = {}
        data: dict[str, Any] = {}
        for key, value in raw.items():
            here = (*path, key)
            if key not in section.model_fields:
                self._unknown_key(section, here, list(raw))
                continue
            field = section.model_fields[key]
            item = item_section_of(field.annotation)
            if inner := section_of(field.annotation):
                data[key] = self.known_keys(inner, value, here)
            elif item and isinstance(value, list):
                data[key] = [self.known_keys(item, v, (*here, i)) for i, v in enumerate(value)]
            elif _no_user_means(value, field.annotation):
                self._tell(here, _bad_value(here, field, value))
                self._doubt(here)
            else:
                data[key] = value
        for name, field in section.model_fields.items():
            if inner := section_of(field.annotation):
                data.setdefault(name, {})
        return data

    def take_out_bad_values(self, error: ValidationError, data: dict[str, Any]) -> None:
        """Tells each key that pydantic refuses or misses, once, and removes the refused ones from `data`."""
        for one in error.errors(include_url=False, include_context=False):
            path, field = _field_at(one["loc"])
            if path in self.doubtful:
                continue
            self.doubtful.append(path)
            holder = _value_at(data, path[:-1])
            if path[-1] in holder:
                self._tell(path, _bad_value(path, field, holder.pop(path[-1])))
            else:
                meaning = f" ({field.description})" if field.description else ""
                self._tell(path, f"{dotted(path)} is missing: give {expected(field)}{meaning}")

    def _unknown_key(self, section: type[Section], path: KeyPath, given: list[Any]) -> None:
        *above, key = path
        close = difflib.get_close_matches(str(key), list(section.model_fields), n=1)
        nearest: list[KeyPath] = [(*above, name) for name in close]
        for name, field in RunConfig.model_fields.items():  # a key of that name in the wrong section
            other = section_of(field.annotation)
            if other and key in other.model_fields and (name, key) not in nearest:
                nearest.append((name, key))
        if nearest:
            hint = f"Nearest legal key{'s' if len(nearest) > 1 else ''}: {', '.join(dotted(p) for p in nearest)}"
        else:
            kind = "sections" if section is RunConfig else "keys here"
            hint = f"Legal {kind}: {', '.join(section.model_fields)}"
        self._tell(path, f"{dotted(path)} is not a known key. {hint}")
        for meant in nearest:
            if meant[-1] not in given or meant[:-1] != tuple(above):
                self._doubt(meant)

    def _tell(self, path: KeyPath, text: str) -> None:
        self.problems.append(Problem(path, text))

    def _doubt(self, path: KeyPath) -> None:
        """Marks the key at `path`, or all keys of the section there."""
        section = _section_at(path)
        self.doubtful += [(*path, name) for name in section.model_fields] if section else [path]


def _certain_cross_checks(data: dict[str, Any], doubtful: list[KeyPath]) -> list[tuple[str, str]]:
    """The broken rules between keys that stay broken, word for word, under two legal values of every doubtful key."""
    found: list[list[tuple[str, str]]] = []
    for variant in (0, 1):
        filled = copy.deepcopy(data)
        for number, path in enumerate(doubtful):
            _value_at(filled, path[:-1]).setdefault(path[-1], legal_value(_field_at(path)[1], variant, number))
        try:
            found.append(cross_checks(RunConfig.model_validate(filled)))
        except ValidationError:  # then nothing is certain: the user hears of these rules once the keys are right
            return []
    keys = {dotted(path) for path in doubtful}
    return [problem for problem in found[0] if problem in found[1] and problem[0] not in keys]


def _bad_value(path: KeyPath, field: FieldInfo, value: Any) -> str:
    types = bare_types(field.annotation)
    fitting = {*types, *([int] if float in types else []), *([list] if tuple in types else [])}
    given = f" ({KINDS[type(value)]})" if type(value) in {int, float, str, list, dict} - fitting and types else ""
    nearest = nearest_values(field, value)
    hint = f". Nearest legal value{'s' if len(nearest) > 1 else ''}: {', '.join(nearest)}" if nearest else ""
    return f"{dotted(path)}={shown(value)}{given} must be {expected(field)}{hint}"


def _no_user_means(value: Any, annotation: Any) -> bool:
    """True where pydantic takes what no user can mean: true for a number, infinity, or what JSON cannot hold."""
    types = bare_types(annotation)
    if dict in types:
        return isinstance(value, dict) and not _is_plain(value)
    if isinstance(value, list):
        return any(_no_user_means(v, float if tuple in types else annotation) for v in value)
    if isinstance(value, bool):
        return bool not in types
    number = as_number(value) if float in types and isinstance(value, (float, str)) else None
    return number is not None and not math.isfinite(number)


def _is_plain(value: Any) -> bool:
    """True for what JSON can hold: the model's own config ends up in a config.json."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _section_at(path: KeyPath) -> type[Section] | None:
    section: type[Section] | None = RunConfig
    for name in path:
        if section is None:
            return None
        if isinstance(name, str):
            annotation = section.model_fields[name].annotation
            section = section_of(annotation) or (item_section_of(annotation) if name != path[-1] else None)
    return section


def _field_at(path: KeyPath) -> tuple[KeyPath, FieldInfo]:
    """The key that holds `path` and its declaration: ("train", "betas", 1) is in the key ("train", "betas")."""
    section: type[Section] = RunConfig
    for i, name in enumerate(path):
        if isinstance(name, int):
            continue
        field = section.model_fields[name]
        inner = section_of(field.annotation) or (item_section_of(field.annotation) if len(path) > i + 2 else None)
        if inner is None:
            return path[: i + 1], field
        section = inner
    raise AssertionError(f"{path} names a section, and all sections were put in")


def _value_at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data
