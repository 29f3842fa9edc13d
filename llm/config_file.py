"""The only reader of a run's YAML file, and its writer: defaults <- file <- `--set`; every problem in one error.

YAML is read by the 1.2 rules where PyYAML's 1.1 surprises: 3e-4 is a number; `no`, 12:30 and 2026-01-31 are text (a key
that takes true or false still takes yes, no, on, off); 010 is not octal. A key given twice is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llm.config import RunConfig
from llm.config_fields import shown
from llm.config_problems import KeyPath, Problem, bad_values, checked, dotted
from llm.errors import ConfigError

SET_FORM = "write --set section.key=value, for example --set train.lr=3e-4 or --set data.sources.0.weight=0.5"

MAX_DIGITS = 100
MAX_VALUES = 100_000  # of a file: a few aliases of aliases can stand for more than any memory holds


def load_run(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the file describes, with `overrides` ("train.steps=400") laid over it.

    An override replaces the whole value at its key: a section given as a map loses its other keys. Raises ConfigError:
    at once where the file cannot be read as a YAML mapping, else with every problem of file and overrides, one a line.
    """
    return parse_run(read_text(path), path, overrides)


def parse_run(text: str, name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """`load_run` for a text that is already here; errors call it `name`."""
    problems: list[Problem] = []
    raw, lines = _mapping(text, name, problems)
    if {"sweep", "space"} <= raw.keys():
        raise ConfigError(f"{name} is a sweep, not a run: use headrace sweep. The run that it varies is {shown(raw.get('run'))}")
    set_here: list[KeyPath] = []
    for override in overrides:
        _apply(raw, override, set_here, problems)
    return _sound(raw, name, problems, lambda path: _where(path, lines, set_here))


def with_settings(config: RunConfig, name: str, settings: Mapping[str, Any]) -> RunConfig:
    """`config` with other values at some dotted keys. Raises ConfigError, calling it `name`, with every problem."""
    problems: list[Problem] = []
    raw = config.values()
    for key, value in settings.items():
        try:
            _place(raw, key, value)
        except LookupError as error:
            problems.append(Problem((key,), f"{key}: {error.args[0]}"))
    return _sound(raw, name, problems, lambda path: "")


def bad_alone(config: RunConfig, key: str, value: Any) -> str | None:
    """What is wrong with another value at a dotted key of `config`, whatever the other keys are."""
    raw = config.values()
    try:
        _place(raw, key, value)
    except LookupError as error:
        return error.args[0]
    return next(iter(bad_values(raw)), None)


def _sound(raw: dict[Any, Any], name: str, problems: list[Problem], where: Callable[[KeyPath], str]) -> RunConfig:
    config, found = checked(raw)
    problems += found
    if config is None or problems:
        told = [f"  {problem.text}{where(problem.path)}" for problem in problems]
        count = f"{len(told)} problem{'' if len(told) == 1 else 's'}"
        raise ConfigError("\n".join([f"{name} has {count}:", *told]))
    return config


def dump_run(config: RunConfig) -> str:
    """`config` as YAML with every default written out. It loads back equal, and equal runs give equal text."""
    values = config.values()
    values["model"]["config"] = _sorted(values["model"]["config"])
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(v) for v in value] if isinstance(value, list) else value


def _where(path: KeyPath, lines: dict[KeyPath, int], set_here: list[KeyPath]) -> str:
    if any(path[: len(key)] == key or (key[: len(path)] == path and path not in lines) for key in set_here):
        return " (from --set)"
    return f" (line {lines[path]})" if path in lines else ""


def read_text(path: str) -> str:
    """The text of a config file. Raises ConfigError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no config file {path}.{_nearest_file(Path(path))}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8: byte {error.start} is not. Save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read as a config file: {reason}") from None


def read_mapping(text: str, name: str) -> dict[Any, Any]:
    """The mapping that a YAML text holds, by the rules above. Raises ConfigError with everything that is wrong with it."""
    problems: list[Problem] = []
    value, _ = _mapping(text, name, problems)
    if problems:
        raise ConfigError("\n".join([f"{name}:", *(f"  {problem.text}" for problem in problems)]))
    return value


def _mapping(text: str, name: str, problems: list[Problem]) -> tuple[dict[Any, Any], dict[KeyPath, int]]:
    """The sections that `text` holds, and the line of every key."""
    lines: dict[KeyPath, int] = {}
    try:
        value = _parse(text, problems, lines)
    except _NotYamlError as error:
        raise ConfigError(f"{name}{error}") from None
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name} must be a mapping of sections (run:, model:, data:, ...), not {shown(value)}")
    return value or {}, lines


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either"
    names = [other.name for other in path.parent.iterdir() if other.suffix in (".yaml", ".yml")]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Nearest: {path.parent / close[0]}" if close else ""


def _apply(raw: dict[Any, Any], override: str, set_here: list[KeyPath], problems: list[Problem]) -> None:
    """Lays one "section.key=value" over `raw`, in place; what is wrong with it goes to `problems`."""
    key, equals, text = override.partition("=")
    if not equals or not all(re.fullmatch(r"\S+", part) for part in key.strip().split(".")):
        problems.append(Problem(("--set",), f"--set {override!r} is malformed: {SET_FORM}"))
        return
    try:
        set_here.append(_place(raw, key.strip(), _parse(text, problems, {})))
    except _NotYamlError as error:
        problems.append(Problem(("--set",), f"--set {override!r} has a value that cannot be read{error}. Put it in quotes"))
    except LookupError as error:
        problems.append(Problem(("--set",), f"--set {override!r}: {error.args[0]}"))


def _place(raw: dict[Any, Any], key: str, value: Any) -> KeyPath:
    """Puts `value` at the dotted `key`, in place. Raises LookupError where nothing can stand there."""
    *above, name = key.split(".")
    place: Any = raw
    path: KeyPath = ()
    for part in above:
        index = _index(place, path, part)
        if isinstance(place, dict) and place.get(index) is None:
            place[index] = {}
        if isinstance(place[index], tuple):  # train.betas of a run that was read
            place[index] = list(place[index])
        place, path = place[index], (*path, index)
    index = _index(place, path, name)
    place[index] = value
    return (*path, index)


def _index(place: Any, path: KeyPath, name: str) -> Any:
    """`name` as a key of the mapping or an index into the list `place`; LookupError where it can be neither."""
    if isinstance(place, dict):
        return name
    if not isinstance(place, list):
        raise LookupError(f"{dotted(path)} is {shown(place)} and holds no key {name}")
    if name.isascii() and name.isdecimal() and int(name) < len(place):
        return int(name)
    legal = f"0 to {len(place) - 1}" if place else "none, it is empty"
    raise LookupError(f"{dotted(path)} has no entry {name}. Legal values: {legal}")


class _NotYamlError(Exception):
    """Where and why a text is not YAML, to be put behind the name of the text."""


def _parse(text: str, problems: list[Problem], lines: dict[KeyPath, int]) -> Any:
    """The value in `text`. Keys given twice go to `problems`, each key's line to `lines`. Raises _NotYamlError."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _note_keys(node, (), problems, lines, {})
            if (size := _expanded(node, {})) > MAX_VALUES:
                raise _NotYamlError(f": its aliases spell out {size:,} values, more than {MAX_VALUES:,}")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise _NotYamlError(f"{line}: not valid YAML: {', '.join(filter(None, (error.context, error.problem)))}") from None
    except yaml.YAMLError as error:
        raise _NotYamlError(f": not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise _NotYamlError(": not valid YAML: nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # PyYAML's own, for a tag that does not fit its value
        raise _NotYamlError(f": not valid YAML: {error}") from None


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, aliases spelt out."""
    if id(node) not in known:
        below = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else ()
        parts = [part for item in below for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def _note_keys(node: yaml.Node, path: KeyPath, problems: list[Problem], lines: dict[KeyPath, int], is_open: dict[int, bool]) -> None:
    if id(node) in is_open:  # an alias: noted where its anchor stands
        if is_open[id(node)]:
            raise _NotYamlError(f", line {node.start_mark.line + 1}: not valid YAML: an anchor that holds itself")
        return
    is_open[id(node)] = True
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*path, i)] = item.start_mark.line + 1
            _note_keys(item, (*path, i), problems, lines, is_open)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            here, line = (*path, key.value), key.start_mark.line + 1
            if here in lines:
                place = f"line {line}" if lines[here] == line else f"lines {lines[here]} and {line}"
                text = f"{dotted(here)} is given twice, in {place}. Keep one"
                problems.append(Problem((*here, "twice"), text))
                continue
            lines[here] = line
            _note_keys(value, here, problems, lines, is_open)
    is_open[id(node)] = False


class _Loader(yaml.SafeLoader):
    """yaml.safe_load with the scalars of YAML 1.2: creates plain data only, whatever the text holds."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - filled below, instead of the inherited ones


class _Dumper(yaml.SafeDumper):
    """Quotes what either reading of YAML, 1.1 or 1.2, would not take for text; writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.Node:
        """Escapes what is no visible character: unescaped, some line breaks come back as others."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_FLOAT = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)", list("-+0123456789")),
    "float": (rf"{_FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+0123456789.")),
    "merge": (r"<<", ["<"]),
}
for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _whole_number(loader: yaml.SafeLoader, node: Any) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text, 0)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Dumper.add_representer(str, _Dumper.represent_text)
