"""The forms in which the same text can be written: what a reader, or a model, would see behind an encoding.

Each form keeps where every one of its characters came from, so that what is found in it can be cut out of the original.
"""

import base64
import binascii
import html
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final
from urllib.parse import unquote_to_bytes

MAX_RUNS: Final = 4000
MAX_ENCODED: Final = 64
"""Runs that could be base64, and those that are: more are not looked into."""
_HIDDEN: Final = re.compile(
    "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff"
    "\U000e0000-\U000e007f]"
)
_CODES: Final = re.compile(
    r"(?:%[0-9A-Fa-f]{2})+|(?:\\u[0-9A-Fa-f]{4})+|&(?:#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|commat|period|colon|lowbar);"
)
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]{16,}")

Places = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Form:
    """`text`, whose character i stands for the original's `starts[i]` to `ends[i]`. `locate` gives these two lists,
    made only when something was found; None where the text is the original, character for character. What is found in a
    form that has a `whole` can only be taken out with all of that part of the original."""

    text: str
    locate: Callable[[], Places] | None = None
    whole: tuple[int, int] | None = None

    @cached_property
    def places(self) -> Places:
        count = len(self.text)
        return (range(count), range(1, count + 1)) if self.locate is None else self.locate()

    def origin(self, start: int, end: int) -> tuple[int, int]:
        """Where in the original the characters `start` to `end` (at least one) of this form are written."""
        return self.whole or (self.places[0][start], self.places[1][end - 1])


class TooMany(Exception):
    """More encoded runs than are looked into: the text cannot be said to be clean."""


class Plain(dict[int, str]):
    """How a character is folded: NFKC, digits of every script as ASCII, invisible ones dropped. Remembers what it
    met."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if _HIDDEN.match(char):
            plain = ""
        elif char.isdecimal():
            plain = str(unicodedata.decimal(char))
        else:
            plain = unicodedata.normalize("NFKC", char)
        self[code] = plain
        return plain


def forms(text: str, plain: Plain) -> Iterator[Form]:
    """The text, folded; that with its codes decoded, if there are any; and each of its runs of base64 that
    decodes to text. Raises TooMany."""
    folded = _folded(text, plain)
    yield folded
    if _CODES.search(folded.text):
        yield _decoded(folded)
    readable = 0
    for number, match in enumerate(_BASE64.finditer(folded.text)):
        if decoded := _readable(_base64(match.group())):
            readable += 1
            yield Form(_folded(decoded, plain).text, whole=folded.origin(*match.span()))
        if number >= MAX_RUNS or readable > MAX_ENCODED:
            raise TooMany


def _folded(text: str, plain: Plain) -> Form:
    if text.isascii() or (folded := text.translate(plain)) == text:
        return Form(text)

    def locate() -> Places:
        """A character stands for itself; one that became several, or was dropped, moves those after it."""
        lengths = [len(plain[ord(char)]) for char in text]
        return (
            [at for at, length in enumerate(lengths) for _ in range(length)],
            [at + 1 for at, length in enumerate(lengths) for _ in range(length)],
        )

    return Form(folded, locate)


def _decoded(base: Form) -> Form:
    """Codes of URLs, JSON and HTML as the characters they stand for."""
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    at = 0
    for match in _CODES.finditer(base.text):
        _keep(base, at, match.start(), (pieces, starts, ends))
        at = match.start()
        for char, length in _characters(match.group()):
            start, end = base.origin(at, at + length)
            pieces.append(char)
            starts.append(start)
            ends.append(end)
            at += length
    _keep(base, at, len(base.text), (pieces, starts, ends))
    return Form("".join(pieces), lambda: (starts, ends))


def _characters(code: str) -> list[tuple[str, int]]:
    """Each decoded character, and how many of the code's it took."""
    if code[0] == "%":
        text = unquote_to_bytes(code).decode(errors="replace")
        return [(char, 3 if char == "\ufffd" else 3 * len(char.encode())) for char in text]
    if code[0] == "\\":
        return [(chr(int(unit, 16)), 6) for unit in code[2:].split("\\u")]
    return [((html.unescape(code) or " ")[0], len(code))]


def _keep(base: Form, start: int, end: int, to: tuple[list[str], list[int], list[int]]) -> None:
    to[0].append(base.text[start:end])
    to[1].extend(base.places[0][start:end])
    to[2].extend(base.places[1][start:end])


def _base64(run: str) -> bytes:
    whole = run[: len(run) - (len(run) % 4 == 1)].replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(whole + "=" * (-len(whole) % 4))
    except (binascii.Error, ValueError):
        return b""


def _readable(raw: bytes) -> str:
    """Text, or nothing: random bytes are seldom all printable."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return ""
    return text if all(char.isprintable() or char in "\r\n\t" for char in text) else ""
