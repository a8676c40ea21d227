"""Originals out, placeholders in; and back again in the answer, however its text is cut into pieces.

A placeholder such as `<EMAIL_a1f3>` says of what kind the hidden value is, so that a model can still speak of it. Equal
values of a conversation have equal placeholders, in every turn; another conversation has others, so nobody can link the
two. The map from placeholder to value exists on the device only, for as long as its request.

A placeholder in JSON must be a string, also where a number stood. What the request's JSON holds as a number, and never
within a string, comes back as that number where the answer's JSON has its placeholder for a whole value.
"""

import bisect
import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from router.privacy.detect import Finding

MIN_DIGITS: Final = 4
_SHAPE: Final = re.compile(r"<[A-Z0-9_]{1,24}_[0-9a-f]{4,64}>", re.IGNORECASE)
_QUOTES: Final = re.compile(r'\\.|(")', re.DOTALL)
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_OF_NUMBERS: Final = frozenset("0123456789+-.eE")
_GAP: Final = 64
"""White space that may stand between a value of the answer's JSON and what says that it is no key."""
_ENDED: Final = rf"(?=[ \t\r\n]{{0,{_GAP}}}[,\]}}])"


class Redaction:
    """One request's placeholders. `key` is secret to the device and the conversation; `taken` are all the request's
    texts, whose own passages of the same shape no placeholder may equal."""

    def __init__(self, key: bytes, taken: Iterable[str]) -> None:
        self._key = key
        self._taken = {shape.lower() for text in taken for shape in _SHAPE.findall(text)}
        self._issued: dict[tuple[str, str], str] = {}
        self._numbers: set[str] = set()
        self._strings: set[str] = set()
        self.values: dict[str, str] = {}
        """Each placeholder's original."""

    def apply(self, text: str, findings: Sequence[Finding], *, as_json: bool = False) -> str:
        """`text` with each finding (in order, none overlapping another) replaced; what is JSON stays JSON: a number
        becomes a string."""
        if as_json:
            return self._apply_in_json(text, findings)
        pieces, at = list[str](), 0
        for finding in findings:
            pieces += [text[at : finding.start], self._placeholder(finding.kind, text[finding.start : finding.end])]
            at = finding.end
        return "".join([*pieces, text[at:]])

    def _apply_in_json(self, text: str, findings: Sequence[Finding]) -> str:
        pieces, at, quotes = list[str](), 0, 0
        for finding in findings:
            if finding.start < at:
                continue  # of a number that is hidden already
            start, end = finding.start, finding.end
            quotes += _count_quotes(text[at:start])
            if quotes % 2:
                placeholder = self._placeholder(finding.kind, plain_of(text[start:end]))
                self._strings.add(placeholder)
                pieces += [text[at:start], placeholder]
            else:
                number = _number_around(text, at, start, end)
                start, end = number or (start, end)
                placeholder = self._placeholder(finding.kind, text[start:end])
                (self._numbers if number else self._strings).add(placeholder)
                pieces += [text[at:start], f'"{placeholder}"']
            quotes += _count_quotes(text[start:end])
            at = end
        return "".join([*pieces, text[at:]])

    def restorer(self, *, in_json: bool = False) -> "Restorer":
        """A fresh one for each text of the answer; `in_json` for one that is JSON, such as a tool call's arguments,
        where some write `<` and `>` as escapes."""
        if not in_json:
            return Restorer(self.values)
        values: dict[str, str] = {}
        numbers: dict[str, str] = {}
        bare = self._numbers - self._strings
        for placeholder, value in self.values.items():
            for spelled in (placeholder, rf"\u003c{placeholder[1:-1]}\u003e"):
                values[spelled] = json.dumps(value, ensure_ascii=False)[1:-1]
                if placeholder in bare:
                    numbers[f'"{spelled}"'] = value
        return Restorer(values, numbers)

    def _placeholder(self, kind: str, value: str) -> str:
        placeholder = self._issued.get((kind, value))
        if placeholder is None:
            placeholder = self._new(kind, value)
            self._issued[kind, value] = placeholder
            self._taken.add(placeholder.lower())
            self.values[placeholder] = value
        return placeholder

    def _new(self, kind: str, value: str) -> str:
        """As few digits as tell it from all others here."""
        digest = hmac.new(self._key, f"{kind}\0{value}".encode(errors="surrogatepass"), hashlib.sha256).hexdigest()
        for digits in range(MIN_DIGITS, len(digest)):
            placeholder = f"<{kind.upper()}_{digest[:digits]}>"
            if placeholder.lower() not in self._taken:
                return placeholder
        raise ValueError("the request's text holds every placeholder there could be")


class Restorer:
    """Puts the originals back into one text that arrives in pieces. What it returns, joined, is the whole text with
    every issued placeholder replaced once, in any case of its letters; originals are never looked through again. It
    holds back only what could be the start of an issued placeholder. `numbers`, for JSON, has placeholders with their
    quotes, which as whole values come back without them."""

    def __init__(self, values: Mapping[str, str], numbers: Mapping[str, str] = MappingProxyType({})) -> None:
        self._values = {placeholder.lower(): value for placeholder, value in {**values, **numbers}.items()}
        self._sorted, self._numbers = sorted(self._values), sorted(map(str.lower, numbers))
        self._openers = '<\\"' if numbers else "<\\"
        self._longest = max(map(len, self._values), default=0) + (_GAP + 1) * bool(numbers)
        patterns = [*(re.escape(number) + _ENDED for number in numbers), *map(re.escape, values)]
        self._pattern = re.compile("|".join(patterns), re.IGNORECASE) if values else None
        self._held = ""

    def push(self, piece: str) -> str:
        if self._pattern is None:
            return piece
        text = self._held + piece
        cut = self.settled(text)
        self._held = text[cut:]
        return self.whole(text[:cut])

    def flush(self) -> str:
        """The rest, at the end of the text: the start of a placeholder that never was one."""
        held, self._held = self._held, ""
        return self.whole(held)

    def whole(self, text: str) -> str:
        """A text that has come in one piece, restored."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._values[match.group().lower()], text)

    def part(self, text: str, start: int, end: int) -> str:
        """These characters of such a text, which cut no placeholder in two, restored."""
        pieces, at = list[str](), start
        for begins, ends in self.places(text):
            if start <= begins < end:
                pieces += [text[at:begins], self._values[text[begins:ends].lower()]]
                at = ends
        return "".join([*pieces, text[at:end]])

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        """Where placeholders stand in it."""
        return (match.span() for match in self._pattern.finditer(text)) if self._pattern else iter(())

    def settled(self, text: str) -> int:
        """How much of the text holds no placeholder that is still being written."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._openers and self._begins(text[start:].lower()):
                return start
        return len(text)

    def _begins(self, begun: str) -> bool:
        """Whether it could go on to be a placeholder, or is one of a number that may yet turn out to be a key."""
        following = bisect.bisect_right(self._sorted, begun)
        if following < len(self._sorted) and self._sorted[following].startswith(begun):
            return True
        before = bisect.bisect_right(self._numbers, begun) - 1
        if before < 0 or not begun.startswith(self._numbers[before]):
            return False
        after = begun[len(self._numbers[before]) :]
        return len(after) <= _GAP and not after.strip()


def plain_of(written: str) -> str:
    """What JSON's escapes in it stand for; itself where it has none."""
    if "\\" not in written:
        return written
    try:
        return str(json.loads(f'"{written}"', strict=False))
    except ValueError:
        return written


def _number_around(text: str, least: int, start: int, end: int) -> tuple[int, int] | None:
    """Where the number of JSON begins (at `least` or later) and ends of which this is a part, if it is one."""
    while start > least and text[start - 1] in _OF_NUMBERS:
        start -= 1
    while end < len(text) and text[end] in _OF_NUMBERS:
        end += 1
    return (start, end) if _NUMBER.fullmatch(text, start, end) else None


def _count_quotes(text: str) -> int:
    """Those that begin or end a string of JSON."""
    return sum(match[1] is not None for match in _QUOTES.finditer(text))


def conversation_key(secret: bytes, opening: Iterable[str]) -> bytes:
    """The key of all turns of the conversation that began with these texts."""
    digest = hmac.new(secret, digestmod=hashlib.sha256)
    for text in opening:
        encoded = text.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8) + encoded)
    return digest.digest()
