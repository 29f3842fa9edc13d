from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.config import CleanSection
from llm.data import clean as cleaning
from llm.data.clean import Cleaner

OFF = {"fix_unicode": False, "strip_control": False, "normalize_whitespace": False}


def clean(text: str, **keys: bool | int) -> str | None:
    return Cleaner(CleanSection(**keys)).clean(text)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("cafÃ© â€œquotedâ€\x9d", "café “quoted”"),
        ("cafe\u0301", "café"),
        ("\ufeffa\u200bb\u00ad\x00c\x7f\x81", "abc"),
        ("page\x0cnext", "page\nnext"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("a  \t\nb \n", "a\nb"),
        ("a\n\n\n\n\nb", "a\n\n\nb"),
        ("\n\n    x = 1\n\ty\n\n", "    x = 1\n\ty"),
        ("lone \ud800 surrogate", "lone  surrogate"),
        ("family \U0001f468\u200d\U0001f469", "family \U0001f468\u200d\U0001f469"),
    ],
)
def test_what_cleaning_mends(before: str, after: str) -> None:
    assert clean(before) == after


@pytest.mark.parametrize(
    "text",
    [
        's = "it\'s &amp; <b>" if a < b else “x”',
        "def f():\n    return 1\n\n\nclass A:\n\tpass",
        "ﬁ ½ Ａ １",  # noqa: RUF100
        "слово «цитата» …",
        "naïve façade, ÀÉÎ Å",
        "日本語 한국어 עברית العربية",
    ],
)
def test_what_cleaning_leaves_alone(text: str) -> None:
    assert clean(text) == text


def test_steps_can_be_off_but_surrogates_always_go() -> None:
    text = "Ã© \x07 \r\n\n\n\n\n "
    assert clean(text, **OFF) == text
    assert clean("a\ud800", **OFF) == "a"
    assert clean("ÀB", lowercase=True) == "àb"


def test_counts_say_what_was_done() -> None:
    cleaner = Cleaner(CleanSection(min_chars=3, lowercase=True))
    assert [cleaner.clean(text) for text in ("Plain", "fine", "x \x07\n", "cafÃ©")] == ["plain", "fine", None, "café"]
    assert cleaner.counts == {
        "documents": 4,
        "chars_in": 18,
        "chars_out": 13,
        "lone_surrogates": 0,
        "fix_unicode": 1,
        "strip_control": 1,
        "normalize_whitespace": 1,
        "lowercase": 1,
        "dropped_short": 1,
    }


# Characters that the steps act on, so that they meet each other often.
troublesome = st.sampled_from("aAé \t\n\r\x00\x0b\x0c\x85\x9f\xa0\u00ad\u0301\u200b\u200d\u2028\ufeff\ud800\udc00ÃÂâ€©™¢İΣ가")


@settings(max_examples=300, deadline=None)
@given(st.text(troublesome | st.characters()), st.booleans())
def test_cleaning_twice_is_cleaning_once(text: str, lowercase: bool) -> None:
    once = clean(text, lowercase=lowercase) or ""
    once.encode()
    assert (clean(once, lowercase=lowercase) or "") == once


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(min_codepoint=0x20, exclude_categories=["Cs", "Cc"])))
def test_text_seen_in_a_wrong_encoding_is_left_or_mended_never_broken(text: str) -> None:
    seen = text.encode().decode("latin-1")
    cleaned = clean(seen) or ""
    assert cleaned.encode().decode() == cleaned


def test_long_runs_of_combining_marks_are_cut_in_linear_time() -> None:
    text = "e" + "\u0323\u0301" * 100_000 + "x"
    started_s = time.monotonic()
    cleaned = clean(text)
    assert time.monotonic() - started_s < 2  # sorting the run took half a minute
    assert cleaned is not None and 25 <= len(cleaned) <= 32 and cleaned[-1] == "x" and clean(cleaned) == cleaned
    within = "e" + "\u0301\u0323" * 15
    assert clean(within) == unicodedata.normalize("NFC", within)


def test_lines_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a  \nbé Ã©  \n\n\n\n\n  c \n" * 20
    whole = clean(text)
    for block in (1, 7, 50):
        monkeypatch.setattr(cleaning, "_BLOCK_CHARS", block)
        assert clean(text) == whole
