"""Texts too long to be held decoded: piece by piece, from the bytes of a JSON line, a Parquet value or a text file.

A decoded text takes up to 4 bytes a character, and parsing, cleaning and tokenizing hold several copies of it. Here only the bytes are held
whole, and a piece at a time is decoded. All pieces joined are the text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

PIECE_BYTES = 1 << 20
LONG_STRING_BYTES = 64 << 10  # a string in JSON of more is taken out before the rest is parsed

_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)  # the inside of a JSON string and its end
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
_MARK = uuid.uuid4().hex  # stands for a string that was taken out, with its number: no text can hold it


class LongRecord:
    """The record of a JSON line, parsed but for its long strings. Raises ValueError and RecursionError as `json.loads` does, also for what
    is wrong in a long string; ValueError for more than `max_rest_bytes` beside these."""

    def __init__(self, line: bytes | bytearray, max_rest_bytes: int) -> None:
        self._line = line
        self._spans: dict[str, tuple[int, int]] = {}
        rest, start, at, size = [], 0, 0, 0
        while (quote := line.find(b'"', at)) >= 0 and (string := _STRING.match(line, quote + 1)):
            at = string.end()
            if at - quote > LONG_STRING_BYTES:
                mark = f"{_MARK}{len(self._spans)}"
                self._spans[mark] = quote + 1, at - 1
                rest += [line[start : quote + 1], mark.encode() + b'"']
                size += quote - start
                start = at
            if size + at - start > max_rest_bytes:
                break
        if size + len(line) - start > max_rest_bytes:
            raise ValueError(f"more than {max_rest_bytes >> 20} MiB beside its long strings")
        self.rest = b"".join([*rest, line[start:]]).decode().removeprefix("\ufeff")

    def parsed(self) -> Any:
        found = json.loads(self.rest)
        for start, stop in self._spans.values():
            for _ in pieces(self._line, start, stop, escaped=True):
                pass
        return found

    def pieces_of(self, value: str) -> Iterator[str]:
        """The pieces of a string that was found in the parsed record."""
        span = self._spans.get(value)
        return iter([value]) if span is None else pieces(self._line, *span, escaped=True)


def pieces(data: bytes | bytearray | memoryview, start: int, stop: int, escaped: bool = False) -> Iterator[str]:
    """The text of data[start:stop], UTF-8, with JSON's escapes where it is the inside of a JSON string. Each piece but the last ends with a
    line, where one ends in it, else before a blank, else anywhere. Raises ValueError where it is neither."""
    held = ""
    while start < stop:
        cut = _whole_characters(data, start, min(start + PIECE_BYTES, stop), escaped) if stop - start > PIECE_BYTES else stop
        try:
            text = str(data[start:cut], "utf-8")
        except UnicodeDecodeError as error:
            error.start += start
            raise
        text = held + (json.loads(f'"{text}"') if escaped else text)
        start = cut
        end = len(text)
        if start < stop:
            end = text.rfind("\n") + 1 or max(text.rfind(" "), 0) or len(text)
        yield text[:end]
        held = text[end:]
        del text
    if held:
        yield held


def _whole_characters(data: bytes | bytearray | memoryview, start: int, at: int, escaped: bool) -> int:
    """The last place up to `at` that is between two characters, and not within an escape or a pair of them. `start` is such a place."""
    for _ in range(3):
        if data[at] & 0xC0 == 0x80:
            at -= 1
    if not escaped or isinstance(data, memoryview):
        return at
    escape = data.rfind(b"\\", at - 6, at)
    if escape >= 0 and _begins_escape(data, start, escape) and escape + (6 if data[escape + 1] == ord("u") else 2) > at:
        at = escape
    if _HIGH_SURROGATE.match(data, at - 6, at) and _begins_escape(data, start, at - 6):
        at -= 6
    return at


def _begins_escape(data: bytes | bytearray, start: int, backslash: int) -> bool:
    """Whether this backslash, the last of a run, is no escaped one."""
    before = data[start : backslash + 1]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
