"""What a server tells, fit for a terminal: text that others wrote could move the cursor, name the window or fill the clipboard.

Of a log the carriage return stays, by which progress bars are drawn. Colours go: a job has no terminal, so it hardly makes any, and to tell
the harmless sequences from the others would take a terminal's whole grammar.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_COLOUR = re.compile(r"\x1b\[[0-?]{0,64}[ -/]{0,8}[@-~]")  # and all that has this form (a control sequence of ECMA-48)
_BEGUN = re.compile(r"\x1b(?:\[[0-?]{0,64}[ -/]{0,8})?\Z")  # one whose end is not there yet
# Controls but tab, line feed and carriage return; half characters, which no output takes; what turns the direction of writing.
_NOT_SHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""`text` in one line, with \x1b for an escape, as Python writes it: what is no text is seen to be none."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def printable_lines(text: str) -> str:
    """The lines of `text`, each printable, without colours."""
    return "\n".join(printable(line) for line in _COLOUR.sub("", text).split("\n"))


class PrintableLog:
    """Shows a log that comes in pieces, cut anywhere, without what a terminal would obey."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._begun = show, ""

    def __call__(self, piece: str) -> None:
        text = self._begun + piece
        begun = _BEGUN.search(text)
        self._begun = begun[0] if begun else ""
        self._show(_NOT_SHOWN.sub("", _COLOUR.sub("", text.removesuffix(self._begun))))
