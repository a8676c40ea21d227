"""router.wording: the fast reading of a prompt is the plain one."""

import pytest
from hypothesis import given, settings

from router import wording
from tests.router import plain
from tests.router.texts import TEXTS


def check(text: str) -> None:
    fast, slow = wording.read(text), plain.read(text)
    assert fast.measures.tolist() == pytest.approx(slow.measures, rel=1e-12, abs=1e-12)
    assert fast.words.tolist() == slow.words
    assert sorted(fast.grams.tolist()) == slow.grams


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_the_fast_reading_is_the_plain_one(text: str) -> None:
    """Any text has the same measures, word hashes and n-gram hashes as when they are worked out one by one."""
    check(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "a", "9" * 3000, "ab " * 2000, "\u0130" * 2500, "日" * 2500, "\nA. x" * 300, "\\" * 600, "\ud800" * 40],
    ids=range(10),
)
def test_extreme_texts_are_read_alike(text: str) -> None:
    """Nothing at all, the longest text that is looked at, the widest characters, and one thing over and over."""
    check(text)


def test_no_character_takes_more_bytes_than_there_are_powers() -> None:
    """Lowering lengthens some characters; the table of powers holds for the worst of them."""
    most = max(len(chr(code).lower().encode("utf-8", "ignore")) for code in range(0x110000))
    assert most * wording.CLIP + 2 <= len(wording._powers()[0])
