"""JSON from a file that anybody may have written: bounded, without the freedoms that hide an edit, and one error for all that is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

from llm.errors import DamagedCheckpointError

MAX_JSON_BYTES = 64 << 20  # the manifest of 15 TB; also the most that `Published.read` takes by itself
MAX_JSON_VALUES = 4_000_000  # about 400 MB of Python objects


def strict_json(data: bytes | bytearray, what: str) -> Any:
    """The value. `what` names the file in errors.

    Raises DamagedCheckpointError for more than MAX_JSON_BYTES or MAX_JSON_VALUES, for what is not UTF-8 or not JSON, for a key given
    twice, NaN and infinities, integers beyond 64 bits and nesting of about 1,000 levels.
    """
    if len(data) > MAX_JSON_BYTES:
        raise DamagedCheckpointError(f"{what} holds {len(data)} bytes of JSON, more than the {MAX_JSON_BYTES} that any checkpoint's has.")
    values = sum(data.count(mark) for mark in (b",", b":", b"[", b"{"))
    if values > MAX_JSON_VALUES:
        raise DamagedCheckpointError(f"{what} holds about {values} values, more than the {MAX_JSON_VALUES} that any checkpoint's has.")
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_bounded_int, parse_float=_finite
        )
    except RecursionError:
        raise DamagedCheckpointError(f"{what} is nested too deeply to be a checkpoint's.") from None
    except ValueError as error:  # not UTF-8, not JSON, or refused below
        raise DamagedCheckpointError(f"{what} is damaged: {str(error)[:200]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:100]!r} stands there twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON's")


def _bounded_int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:30]} is infinite")
    return value
