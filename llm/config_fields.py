"""What one key of the configuration takes, read off its declaration in `llm/config.py`: its rule and the legal
values nearest to an illegal one. `llm/config_problems.py` asks; nothing here knows a whole run.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from llm.config_section import Section
from llm.redact import cleaned, without_secrets

SHOWN_CHARS = 60  # of a value in a message
BOUND_WORDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "under"}
KINDS = {
    NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def shown(value: Any) -> str:
    """`value` as YAML would write it, shortened: 'two' in quotes, null, true, 1.5."""
    if isinstance(value, str):
        text = repr(without_secrets(value))
    elif isinstance(value, float):
        text = repr(value).replace("inf", ".inf").replace("nan", ".nan")
    else:
        text = json.dumps(cleaned(value), default=str, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."


def section_of(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def item_section_of(annotation: Any) -> type[Section] | None:
    """The section that each entry of a list is, as in data.sources."""
    return section_of(get_args(annotation)[0]) if get_origin(annotation) is list else None


def bare_types(annotation: Any) -> list[type]:
    """The types that a union is made of, without parameters and enumerations: int | Literal["auto"] -> [int]."""
    return [get_origin(part) or part for part in _parts(annotation) if get_origin(part) is not Literal]


def choices(annotation: Any) -> list[Any]:
    return [choice for part in _parts(annotation) if get_origin(part) is Literal for choice in get_args(part)]


def as_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def expected(field: FieldInfo) -> str:
    """What `field` takes: "a whole number of at least 1, or auto"."""
    bounds, types, names = _bounds(field), bare_types(field.annotation), choices(field.annotation)
    limits = "".join(f" {words} {bounds[name]}" for name, words in BOUND_WORDS.items() if name in bounds)
    some = " of at least one character" if any(getattr(rule, "min_length", None) for rule in field.metadata) else ""
    parts: list[str] = []
    for kind in types:
        if kind in (int, float):
            parts.append(KINDS[kind] + limits.replace(" of at most", " and at most").replace(" under", " and under"))
        elif kind is str:
            parts.append(f"text that matches {bounds['pattern']}" if "pattern" in bounds else f"text{some}")
        elif kind is tuple:
            parts.append(f"a list of {len(get_args(field.annotation))} numbers")
        elif item := item_section_of(field.annotation):
            parts.append(f"a list of at least one mapping of {', '.join(item.model_fields)}")
        elif kind is dict:
            parts.append("a mapping of names to plain values")
        elif kind is not NoneType:
            parts.append(KINDS.get(kind, kind.__name__))
    if names:
        parts.append(("one of " if len(names) > 1 else "") + ", ".join(str(name) for name in names))
    if NoneType in types:
        parts.append("null")
    return ", or ".join(parts)


def nearest_values(field: FieldInfo, value: Any) -> list[str]:
    """The legal values next to `value`, as the user would write them; none where nothing is near."""
    types, names = bare_types(field.annotation), choices(field.annotation)
    number = None if isinstance(value, bool) else as_number(value)
    if number is not None and math.isfinite(number):
        if names and all(isinstance(choice, int) for choice in names):
            return [str(min(names, key=lambda choice: abs(choice - number)))]
        if int in types or float in types:
            return _clamped(number, _bounds(field), whole=int in types)
    if isinstance(value, str):
        words = [str(choice) for choice in names] or (["true", "false"] if bool in types else [])
        if close := difflib.get_close_matches(value.lower(), words, n=1, cutoff=0.3):
            return close
    if str in types and isinstance(value, (bool, int, float, str)):
        return _legal_text(field, str(value).lower() if isinstance(value, bool) else str(value))
    return []


def legal_value(field: FieldInfo, variant: int, number: int) -> Any:
    """The first (variant 0) or second (variant 1) of a few values that `field` takes; texts differ by `number`."""
    candidates: list[Any] = [] if field.is_required() else [field.get_default(call_default_factory=True)]
    candidates += [1, 2, 8, 4096, 8192, 1.0, 0.5, True, False, *choices(field.annotation)]
    candidates += [f"p{number}", "https://p", None]
    if item := item_section_of(field.annotation):
        required = {name: f for name, f in item.model_fields.items() if f.is_required()}
        candidates.append([{name: legal_value(f, variant, number) for name, f in required.items()}])
    kind: Any = Annotated[field.annotation, field]  # pyright: ignore[reportInvalidTypeForm]
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    legal: list[Any] = []
    for candidate in candidates:
        try:
            adapter.validate_python(candidate)
        except ValidationError:
            continue
        if candidate not in legal:
            legal.append(candidate)
    return legal[min(variant, len(legal) - 1)]


def _clamped(number: float, bounds: dict[str, Any], whole: bool) -> list[str]:
    if not whole:
        near = min(max(number, bounds.get("ge", -math.inf)), bounds.get("le", math.inf))
        at_open_end = near <= bounds.get("gt", -math.inf) or near >= bounds.get("lt", math.inf)
        return [] if at_open_end else [f"{near:g}"]
    low = bounds.get("ge", bounds["gt"] + 1 if "gt" in bounds else -math.inf)
    high = bounds.get("le", bounds["lt"] - 1 if "lt" in bounds else math.inf)
    return [str(n) for n in sorted({min(max(n, low), high) for n in (math.floor(number), math.ceil(number))})]


def _legal_text(field: FieldInfo, text: str) -> list[str]:
    """`text` with what the field's pattern forbids replaced, in quotes, without which YAML may read something else."""
    if not text:
        return []
    pattern = _bounds(field).get("pattern", ".")
    for candidate in (text, f"http://{text}", re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100]):
        if re.search(pattern, candidate):
            return [repr(candidate)]
    return []


def _bounds(field: FieldInfo) -> dict[str, Any]:
    """The rules among ge, gt, le, lt and pattern that the field was declared with."""
    rules = ((name, getattr(rule, name, None)) for rule in field.metadata for name in (*BOUND_WORDS, "pattern"))
    return {name: rule for name, rule in rules if rule is not None}


def _parts(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation
