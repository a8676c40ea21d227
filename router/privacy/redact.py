"""Originals out, placeholders in; and back again in the answer, however its text is cut into pieces.

A placeholder such as `<EMAIL_a1f3>` says of what kind the hidden value is, so that a model can still speak of it. Equal
values of a conversation have equal placeholders, in every turn; another conversation has others, so nobody can link the
two. The map from placeholder to value exists on the device only, for as long as its request.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from router.privacy.detect import Finding

MIN_DIGITS: Final = 4
_SHAPE: Final = re.compile(r"<[A-Z0-9_]{1,24}_[0-9a-f]{4,64}>", re.IGNORECASE)
_QUOTES: Final = re.compile(r'\\.|(")', re.DOTALL)


class Redaction:
    """One request's placeholders. `key` is secret to the device and the conversation; `taken` are all the request's
    texts, whose own passages of the same shape no placeholder may equal."""

    def __init__(self, key: bytes, taken: Iterable[str]) -> None:
        self._key = key
        self._taken = {shape.lower() for text in taken for shape in _SHAPE.findall(text)}
        self._issued: dict[tuple[str, str], str] = {}
        self.values: dict[str, str] = {}
        """Each placeholder's original."""

    def apply(self, text: str, findings: Sequence[Finding], *, as_json: bool = False) -> str:
        """`text` with each finding (in order, none overlapping another) replaced; what is JSON stays JSON: a number
        becomes a string."""
        if not findings:
            return text
        pieces, at, quotes = list[str](), 0, 0
        for finding in findings:
            before, value = text[at : finding.start], text[finding.start : finding.end]
            placeholder = self._placeholder(finding.kind, plain_of(value) if as_json else value)
            if as_json:
                quotes += _count_quotes(before)
                placeholder = placeholder if quotes % 2 else f'"{placeholder}"'
                quotes += _count_quotes(value)
            pieces += [before, placeholder]
            at = finding.end
        return "".join([*pieces, text[at:]])

    def restorer(self, *, in_json: bool = False) -> "Restorer":
        """A fresh one for each text of the answer; `in_json` for one that is JSON, such as a tool call's arguments,
        where some write `<` and `>` as escapes."""
        values = self.values
        if in_json:
            values = {placeholder: json.dumps(value, ensure_ascii=False)[1:-1] for placeholder, value in values.items()}
            values |= {rf"\u003c{placeholder[1:-1]}\u003e": value for placeholder, value in values.items()}
        return Restorer(values)

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
    holds back only what could be the start of an issued placeholder."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = {placeholder.lower(): value for placeholder, value in values.items()}
        self._longest = max(map(len, values), default=0)
        self._pattern = re.compile("|".join(map(re.escape, values)), re.IGNORECASE) if values else None
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
        return held

    def whole(self, text: str) -> str:
        """A text that has come in one piece, restored."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._values[match.group().lower()], text)

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        """Where placeholders stand in it."""
        return (match.span() for match in self._pattern.finditer(text)) if self._pattern else iter(())

    def settled(self, text: str) -> int:
        """How much of the text holds no placeholder that is still being written."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in "<\\" and self._begins(text[start:].lower()):
                return start
        return len(text)

    def _begins(self, begun: str) -> bool:
        return any(len(begun) < len(whole) and whole.startswith(begun) for whole in self._values)


def plain_of(written: str) -> str:
    """What JSON's escapes in it stand for; itself where it has none."""
    if "\\" not in written:
        return written
    try:
        return str(json.loads(f'"{written}"', strict=False))
    except ValueError:
        return written


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
