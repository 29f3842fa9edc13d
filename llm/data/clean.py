"""Text as the tokenizer gets it: mended Unicode, no controls, plain whitespace. Indentation stays: code is text."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from functools import lru_cache

import ftfy

from llm.config import CleanSection
from llm.state import CLEANING

# ftfy mends text that was decoded with the wrong encoding ("Ã©" for "é"). Its other fixes are off, because they alter
# what prose and code mean to say: quotes, entities, ligatures, widths. Controls and line ends are the later steps' own.
_FTFY = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=False,
    remove_control_chars=False,
    explain=False,
)

# The encodings that ftfy knows UTF-8 to be mistaken for.
_MISTAKEN = ("latin-1", "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1257", "iso-8859-2", "mac-roman", "cp437")


def _seen_as(first: int, last: int) -> str:
    """A regex class of what the bytes look like in the mistaken encodings."""
    shown = {bytes([i]).decode(codec, "ignore") for codec in _MISTAKEN for i in range(first, last + 1)}
    return "".join(sorted(map(re.escape, shown)))


# A UTF-8 sequence seen in a mistaken encoding, or a C1 control: without one ftfy changes nothing, and this is faster
# than asking it. The blank, \x1a, \ufffd and ? stand where a program has replaced a byte.
# One class comes first, for `re` skips quickly to what may begin a match only if a pattern begins with one.
_MORE = f"[{_seen_as(0x80, 0xBF)} \x1a\ufffd?]"
_LEADS = {1: _seen_as(0xC2, 0xDF), 2: _seen_as(0xE0, 0xEF), 3: _seen_as(0xF0, 0xF4)}  # by the number of bytes that follow
_ALONE = "\x1a\x80-\x9f"
_MAYBE_MISTAKEN = re.compile(
    f"[{''.join(_LEADS.values())}{_ALONE}](?:(?<=[{_ALONE}])|"
    + "|".join(f"(?<=[{lead}]){_MORE}{{{more}}}" for more, lead in _LEADS.items())
    + ")"
)

_SURROGATE = re.compile("[\ud800-\udfff]")
_PAGE_END = re.compile("[\x0b\x0c\x85]")  # vertical tab, form feed, next line: they part words, so they become newlines
# C0 and C1 controls, but for tab, newline and carriage return (normalize_whitespace's own). Then what shows nothing and
# joins nothing: soft hyphen, zero-width space, word joiner and invisible operators, byte order mark, interlinear marks,
# noncharacters. The zero-width joiner and non-joiner stay, for emoji, Persian and the Indic scripts are spelt with
# them; direction marks stay for Arabic and Hebrew.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060-\u2064\ufeff\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff]")
_ASCII_CONTROL = bytes(code for code in range(0x80) if _CONTROL.match(chr(code)))
_BLANK_LINES = re.compile("\n{4,}")
_BLOCK_CHARS = 1 << 20  # split into lines at once: a list of short lines takes 20 times the memory of their text
_MAX_MARKS = 30  # combining one after the other: what Unicode calls stream-safe (UAX #15); no language needs half of them
_MAX_ROUNDS = 8  # one is nearly always enough; a removed character can bring together two that a step then changes


class Cleaner:
    """Applies the steps that `section` switches on, in the order of its fields, and counts what they did in `counts`.

    `counts`: `documents`; `chars_in`, and `chars_out` of those kept; for each step the documents it changed;
    `lone_surrogates`, the documents that held code points no encoding can express (they are always removed, or the
    tokenizer would fail); `dropped_short`. Cleaning is a function of the text alone; cleaning twice changes no more.
    """

    def __init__(self, section: CleanSection) -> None:
        steps: dict[str, Callable[[str], str]] = {
            "fix_unicode": _fix_unicode,
            "strip_control": _strip_control,
            "normalize_whitespace": _normalize_whitespace,
            "lowercase": str.lower,
        }
        self.min_chars = max(1, section.min_chars)  # an empty document is no document
        self.counts: dict[str, int] = dict.fromkeys(CLEANING, 0)
        self._steps = [(name, step) for name, step in steps.items() if getattr(section, name)]

    def clean(self, text: str) -> str | None:
        """The cleaned text, or None when fewer than `min_chars` characters are left."""
        counts = self.counts
        counts["documents"] += 1
        counts["chars_in"] += len(text)
        changed_by: set[str] = set()
        for _ in range(_MAX_ROUNDS):
            before = text
            text = self._round(text, changed_by)
            if text == before or text.isascii():  # on ASCII one round is final
                break
        for name in changed_by:
            counts[name] += 1
        if len(text) < self.min_chars:
            counts["dropped_short"] += 1
            return None
        counts["chars_out"] += len(text)
        return text

    def _round(self, text: str, changed_by: set[str]) -> str:
        try:
            text.encode()  # ten times as fast as a search
        except UnicodeEncodeError:
            text = _SURROGATE.sub("", text)
            changed_by.add("lone_surrogates")
        for name, step in self._steps:
            stepped = step(text)
            if stepped != text:
                changed_by.add(name)
                text = stepped
        return text


def _fix_unicode(text: str) -> str:
    """Mends wrong decodings line by line, for a file may mix several, and composes accents (NFC)."""
    if text.isascii():
        return text
    if _MAYBE_MISTAKEN.search(text):
        text = _by_line(text, _fix_line)
    if unicodedata.is_normalized("NFC", text):
        return text
    # Normalizing sorts each run of marks, in a time that grows with the square of its length: minutes for a million.
    return unicodedata.normalize("NFC", _long_runs_of_marks().sub(r"\1", text))


@lru_cache(maxsize=1)
def _long_runs_of_marks() -> re.Pattern[str]:
    """Group 1 is what is kept. A mark: what is, or decomposes into something that begins with, a character of a combining class."""
    marks = [chr(i) for i in range(0x300, sys.maxunicode + 1) if unicodedata.combining(unicodedata.normalize("NFD", chr(i))[0])]
    return re.compile(f"([{''.join(marks)}]{{{_MAX_MARKS}}})[{''.join(marks)}]+")


def _fix_line(line: str) -> str:
    if line.isascii() or not _MAYBE_MISTAKEN.search(line):
        return line
    return ftfy.fix_encoding(line, _FTFY)


def _strip_control(text: str) -> str:
    if text.isascii():  # four times as fast as a search
        raw = text.encode()
        if len(raw.translate(None, _ASCII_CONTROL)) == len(raw):
            return text
    elif _CONTROL.search(text) is None:
        return text
    return _CONTROL.sub("", _PAGE_END.sub("\n", text))


def _normalize_whitespace(text: str) -> str:
    """Newlines are \\n, no line ends in blanks, at most two blank lines together, none at either end."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _by_line(text, str.rstrip)
    if "\n\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n\n", text)
    return text.strip("\n")


def _by_line(text: str, change: Callable[[str], str]) -> str:
    """The text with each line changed."""
    parts, start = [], 0
    while start + _BLOCK_CHARS < len(text) and (end := text.find("\n", start + _BLOCK_CHARS)) >= 0:
        parts.append("\n".join(map(change, text[start:end].split("\n"))))
        start = end + 1
    parts.append("\n".join(map(change, text[start:].split("\n"))))
    return parts[0] if len(parts) == 1 else "\n".join(parts)
