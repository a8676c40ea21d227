"""Originals out, placeholders in; and back again in the answer, however its text is cut into pieces.

A placeholder such as `<EMAIL_a1f3>` says of what kind the hidden value is, so that a model can still speak of it. Equal
values of a conversation have equal placeholders, in every turn; another conversation has others, so nobody can link the
two. The map from placeholder to value exists on the device only, for as long as its request.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from router.privacy.detect import Finding

MIN_DIGITS: Final = 4
_SHAPE: Final = re.compile(r"<[A-Z0-9_]{1,24}_[0-9a-f]{4,64}>", re.IGNORECASE)


class Redaction:
    """One request's placeholders. `key` is secret to the device and the conversation; `taken` are all the request's
    texts, whose own passages of the same shape no placeholder may equal."""

    def __init__(self, key: bytes, taken: Iterable[str]) -> None:
        self._key = key
        self._taken = {shape.lower() for text in taken for shape in _SHAPE.findall(text)}
        self._issued: dict[tuple[str, str], str] = {}
        self.values: dict[str, str] = {}
        """Each placeholder's original."""

    def apply(self, text: str, findings: Sequence[Finding]) -> str:
        """`text` with each finding (in order, none overlapping another) replaced."""
        pieces, at = [], 0
        for finding in findings:
            pieces += [text[at : finding.start], self._placeholder(finding.kind, text[finding.start : finding.end])]
            at = finding.end
        return "".join([*pieces, text[at:]])

    def restorer(self, *, in_json: bool = False) -> "Restorer":
        """A fresh one for each text of the answer; `in_json` for one that is JSON, such as a tool call's arguments."""
        values = self.values
        if in_json:
            values = {placeholder: json.dumps(value, ensure_ascii=False)[1:-1] for placeholder, value in values.items()}
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
        self._pattern = re.compile("|".join(map(re.escape, values)), re.IGNORECASE) if values else None
        self._held = ""

    def push(self, piece: str) -> str:
        if self._pattern is None:
            return piece
        text = self._held + piece
        cut = self._safe(text)
        self._held = text[cut:]
        return self._pattern.sub(lambda match: self._values[match.group().lower()], text[:cut])

    def flush(self) -> str:
        """The rest, at the end of the text: the start of a placeholder that never was one."""
        held, self._held = self._held, ""
        return held

    def _safe(self, text: str) -> int:
        """How much of the text holds no placeholder that is still being written. Each has one `<`, its first
        character."""
        start = text.rfind("<")
        if start < 0:
            return len(text)
        begun = text[start:].lower()
        writing = any(len(begun) < len(whole) and whole.startswith(begun) for whole in self._values)
        return start if writing else len(text)


def conversation_key(secret: bytes, opening: Iterable[str]) -> bytes:
    """The key of all turns of the conversation that began with these texts."""
    digest = hmac.new(secret, digestmod=hashlib.sha256)
    for text in opening:
        encoded = text.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8) + encoded)
    return digest.digest()
