"""router.tokens: what is found kind by kind is what one pattern finds token by token."""

import pytest
from hypothesis import given, settings

from router.tokens import tokens
from tests.router.plain import TOKEN
from tests.router.texts import TEXTS

_SIGNS = {sign for sign in map(chr, range(128)) if not (sign.isalnum() or sign.isspace() or sign == "_")}


def check(text: str) -> None:
    found, said = TOKEN.findall(text), tokens(text)
    words = [one for one in found if "a" <= one[0] <= "z"]
    numbers = [one for one in found if one[0].isdecimal()]
    commands = [one for one in found if one[0] == "\\" and len(one) > 1]
    assert [word.decode() for word in said.words] == words
    assert said.numbers == numbers
    assert [command.decode() for command in said.commands] == commands
    assert said.total == len(found)
    assert len(said.kinds) == len(set(found))
    assert said.first == (found[0] if words[:1] == found[:1] != [] else "")
    assert said.signs.decode() == "".join(sign for sign in text if sign in _SIGNS)


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_kind_by_kind_is_token_by_token(text: str) -> None:
    """Any text in lower case has the same tokens either way."""
    check(text.lower())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1.2,3. 4,",
        "\\\\frac\\frac\\ \\1",
        "a.b",
        "..",
        "1.",
        "\x00\x1c\x7f_",
        "\u2019n\u2019 \u2013 \u2026",
        "½٣.٤², x2y",
        "\ud800a\ud800",
    ],
)
def test_what_belongs_together_is_one_token(text: str) -> None:
    """Points within numbers, backslashes of commands, and signs and digits of other scripts."""
    check(text)
