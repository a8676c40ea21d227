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
"""Runs that could be base64 or hexadecimal, and those that are: more are not looked into."""
MAX_LAYERS: Final = 3
"""Of codes within codes, such as `%2540`."""
MIN_RUN: Final = 16
MAX_KNOWN: Final = 4096
"""Codes whose meaning is remembered."""
_HIDDEN: Final = re.compile(  # nothing is seen of them; and accents, which one keyboard writes apart and another not
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\ufff0-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\u3099\u309a]"
)
_LOOKS_LIKE: Final = dict.fromkeys("\u00b7\u2022\u2219\u22c5\u3002\u30fb", ".") | dict.fromkeys("\u2212\u30fc", "-")
"""What people put between the digits of a number, beside the dashes that Unicode knows as such."""
_CODES: Final = re.compile(
    r"(?:%[0-9A-Fa-f]{2})+"
    r"|\\{1,4}u[Dd][89ABab][0-9A-Fa-f]{2}\\{1,4}u[Dd][C-Fc-f][0-9A-Fa-f]{2}"
    r"|\\{1,4}(?:u[0-9A-Fa-f]{4}|u\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}|[\"'/bfnrt])"
    r"|&(?:#[0-9]{1,7};?|#[xX][0-9A-Fa-f]{1,6};?|[A-Za-z]{2,8};)"
    r"|(?<=[0-9])\+(?=[0-9])"  # a space, where a form's fields are sent
    r"|[ ]?[\[({][ ]?(?:at|AT|dot|DOT)[ ]?[\])}][ ]?"
)
_SIGNS: Final = "%\\&+[({"
"""No code is without one of them."""
_RUN: Final = re.compile(r"[A-Za-z0-9+/_-]{16,}(?:\r?\n[A-Za-z0-9+/_-]{16,})*")
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})+")
_UNITS: Final = re.compile(r"[ux]\{?([0-9A-Fa-f]+)")
_ESCAPED: Final = {"b": " ", "f": " ", "n": "\n", "r": "\r", "t": "\t"}

ENCODED: Final = (
    r"%[0-9A-Fa-f]{2}|\\[ux\"'/bfnrt]|&[#A-Za-z]|[0-9]\+[0-9]|[\[({] ?(?:at|AT|dot|DOT) ?[\])}]",
    r"[A-Za-z0-9+/_-]{16,}",
)
"""What each code, and each run, has in it, as RE2 writes it: a text without any of it has no other form."""

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
    """How a character is folded: its compatible form (NFKC) without accents, digits of every script as ASCII, dashes
    of all kinds as one, invisible ones dropped. Remembers what it met."""

    def __init__(self) -> None:
        super().__init__()
        self._codes: dict[str, str] = {}

    def decoded(self, match: re.Match[str]) -> str:
        """What a code stands for, folded."""
        code = match.group()
        shown = self._codes.get(code)
        if shown is None:
            shown = "".join(self[ord(char)] for char, _ in _characters(code))
            if len(self._codes) < MAX_KNOWN and len(code) < MIN_RUN:
                self._codes[code] = shown
        return shown

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if char.isdecimal():
            plain = str(unicodedata.decimal(char))
        elif char in _LOOKS_LIKE or unicodedata.category(char) == "Pd":
            plain = _LOOKS_LIKE.get(char, "-")
        else:
            plain = unicodedata.normalize("NFC", _HIDDEN.sub("", unicodedata.normalize("NFKD", char)))
        self[code] = plain
        return plain


def forms(text: str, plain: Plain, layers: int = MAX_LAYERS) -> Iterator[Form]:
    """The text, folded; that with its codes decoded, and decoded again while there are any; and each of its runs of
    base64 or hexadecimal digits that decodes to text, in that text's own forms. Raises TooMany."""
    base = folded(text, plain)
    yield base
    yield from others(base, plain, layers)


def others(base: Form, plain: Plain, layers: int = MAX_LAYERS) -> Iterator[Form]:
    """The forms of a folded text beside itself."""
    form = base
    for _ in range(layers):
        if not any(sign in form.text for sign in _SIGNS) or not _CODES.search(form.text):
            break
        form = _decoded(form, plain)
        yield form
    if layers > 1:
        yield from _encoded(base, plain, layers - 1)


def _encoded(base: Form, plain: Plain, layers: int) -> Iterator[Form]:
    readable = 0
    for number, match in enumerate(_RUN.finditer(base.text)):
        if text := _unwrapped(match.group()):
            readable += 1
            whole = base.origin(*match.span())
            yield from (Form(form.text, whole=whole) for form in forms(text, plain, layers))
        if number >= MAX_RUNS or readable > MAX_ENCODED:
            raise TooMany


def folded(text: str, plain: Plain) -> Form:
    """The text as it reads, character for character."""
    if text.isascii() or (read := text.translate(plain)) == text:
        return Form(text)

    def locate() -> Places:
        """A character stands for itself; one that became several, or was dropped, moves those after it."""
        lengths = [len(plain[ord(char)]) for char in text]
        return (
            [at for at, length in enumerate(lengths) for _ in range(length)],
            [at + 1 for at, length in enumerate(lengths) for _ in range(length)],
        )

    return Form(read, locate)


def _decoded(base: Form, plain: Plain) -> Form:
    """Codes of URLs, JSON and HTML as the characters they stand for."""

    def locate() -> Places:
        starts: list[int] = []
        ends: list[int] = []
        at = 0
        for match in _CODES.finditer(base.text):
            starts += base.places[0][at : match.start()]
            ends += base.places[1][at : match.start()]
            at = match.start()
            for char, length in _characters(match.group()):
                start, end = base.origin(at, at + length)
                starts += [start] * len(plain[ord(char)])
                ends += [end] * len(plain[ord(char)])
                at += length
        return [*starts, *base.places[0][at:]], [*ends, *base.places[1][at:]]

    return Form(_CODES.sub(plain.decoded, base.text), locate)


def _characters(code: str) -> list[tuple[str, int]]:
    """Each decoded character, and how many of the code's it took."""
    match code[0]:
        case "%":
            text = unquote_to_bytes(code).decode(errors="replace")
            return [(char, 3 if char.isascii() or char == "\ufffd" else 3 * len(char.encode())) for char in text]
        case "&":
            text = html.unescape(code) or " "
            return [(char, 1) for char in code] if text == code else [(text[0], len(code))]
        case "+":
            return [(" ", 1)]
        case "\\":
            return [(_unescaped(code), len(code))]
        case _:
            return [("@" if "a" in code.lower() else ".", len(code))]


def _unescaped(code: str) -> str:
    escape = code.lstrip("\\")
    if len(escape) == 1:
        return _ESCAPED.get(escape, escape)
    first, *second = (int(digits, 16) for digits in _UNITS.findall(code))
    if second:
        return chr(0x10000 + ((first & 0x3FF) << 10) + (second[0] & 0x3FF))
    return chr(first) if first <= 0x10FFFF else " "


def _unwrapped(run: str) -> str:
    """The text that lines of letters and digits encode: all of them together or, of those that do so for themselves,
    each, or what follows its last slash, as in a path."""
    lines = run.split()
    if text := _encoded_in(joined := "".join(lines)):
        return text
    parts = dict.fromkeys(part for line in lines for part in (line, line.rpartition("/")[2]))
    return "\n".join(filter(None, (_encoded_in(part) for part in parts if MIN_RUN <= len(part) < len(joined))))


def _encoded_in(run: str) -> str:
    return (_HEX.fullmatch(run) and _readable(bytes.fromhex(run))) or _readable(_base64(run))


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
