r"""What a text is made of: words, numbers, commands and signs, in no common order.

They are what `[a-z]+|\d+(?:[.,]\d+)*|\\[a-z]+|[^\w\s]` finds. But each kind is looked for by what is fastest for it,
which for words and signs is one table over all bytes.
"""

import re
from collections.abc import Set
from typing import Final, NamedTuple

_FIRST: Final = re.compile(r"([a-z]+)|\d|[^\w\s]")
_NUMBER: Final = re.compile(r"\d+(?:[.,]\d+)*")
_COMMAND: Final = re.compile(rb"\\[a-z]+")
_FOREIGN: Final = re.compile(r"[^\x00-\x7f]")
_LETTERS: Final = bytes(byte if 97 <= byte <= 122 else 32 for byte in range(256))
_NUMERIC: Final = bytes(byte if chr(byte) in "0123456789.," else 32 for byte in range(256))
_NO_SIGNS: Final = bytes(
    byte for byte in range(256) if byte >= 128 or chr(byte).isalnum() or chr(byte).isspace() or chr(byte) == "_"
)
_BACKSLASH, _POINT, _COMMA = b"\\.,"


class Tokens(NamedTuple):
    words: list[bytes]
    """Runs of a to z."""
    numbers: list[str]
    """With the points and commas within them."""
    commands: list[bytes]
    """Of TeX: a backslash and a word, which is then none of `words`."""
    signs: bytes
    """All of ASCII's, in order: those within numbers and commands, which are no tokens, too."""
    first: str
    """The first token if it is a word, else nothing."""
    total: int
    """Of all tokens, signs beyond ASCII included."""
    kinds: Set[object]
    """The different ones among them."""


def tokens(text: str) -> Tokens:
    """Of a text in lower case."""
    raw = text.encode("utf-8", "surrogatepass")
    signs = raw.translate(None, _NO_SIGNS)
    commands = _COMMAND.findall(raw) if b"\\" in signs else []
    words = (_COMMAND.sub(b" ", raw) if commands else raw).translate(_LETTERS).split()
    digits = b" ".join(raw.translate(_NUMERIC).split()).decode() if text.isascii() else text
    numbers = _NUMBER.findall(digits)
    foreign = (
        [] if text.isascii() else [sign for sign in _FOREIGN.findall(text) if not (sign.isalnum() or sign.isspace())]
    )
    joined = " ".join(numbers)
    within = {_BACKSLASH: len(commands), _POINT: joined.count("."), _COMMA: joined.count(",")}
    alone = set(signs).difference(sign for sign, times in within.items() if times and times == signs.count(sign))
    first = _FIRST.search(text)
    return Tokens(
        words,
        numbers,
        commands,
        signs,
        (first and first[1]) or "",
        len(words) + len(numbers) + len(commands) + len(signs) - sum(within.values()) + len(foreign),
        {*words, *numbers, *commands, *alone, *foreign},
    )
