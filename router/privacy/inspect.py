"""What of a whole request is private: every text in it is looked through, and the same walk puts placeholders in.

There is one walk for both, over all fields but those that hold no user's text, so that a field added tomorrow is looked
through from its first day, and nothing that was found can be missed when it is replaced.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from router.privacy.detect import MAX_CHARS, MAX_FINDINGS, Detector, Finding, Undecided
from router.privacy.redact import Redaction, conversation_key
from shared.schemas import ChatRequest

_STRUCTURAL: Final = frozenset({"model", "label"})
"""Fields of a request whose text is the protocol's."""


@dataclass(frozen=True, slots=True)
class Privacy:
    """What was found: the kinds, in order of the alphabet. `undecided` says why the request could not be looked
    through; it must then be taken for private."""

    kinds: tuple[str, ...] = ()
    secret: bool = False
    undecided: str | None = None

    @property
    def personal(self) -> bool:
        """There is something of a person or a secret in it, or nobody can tell."""
        return bool(self.kinds) or self.undecided is not None


CLEAN: Final = Privacy()


def inspect(request: ChatRequest, detector: Detector) -> Privacy:
    """Never raises: what goes wrong makes the request private."""
    found: list[Finding] = []

    def look(text: str, findings: list[Finding]) -> str:
        found.extend(findings)
        return text

    try:
        _looked_through(_user_fields(request), detector, look)
    except Undecided as error:
        return Privacy(undecided=str(error))
    except Exception as error:  # a detector that breaks has found nothing out
        return Privacy(undecided=f"the detector failed: {type(error).__name__}")
    return Privacy(tuple(sorted({one.kind for one in found})), any(one.secret for one in found))


def redacted(request: ChatRequest, detector: Detector, secret: bytes) -> tuple[ChatRequest, Redaction]:
    """The request with a placeholder for each finding, labelled free, and the way back. `secret` is the device's.
    Raises Undecided where `inspect` would say so."""
    fields = _user_fields(request)
    texts: list[str] = []

    def note(text: str) -> str:
        texts.append(text)
        return text

    _walk(fields, note)
    redaction = Redaction(conversation_key(secret, _opening(request)), texts)
    fields = _looked_through(fields, detector, redaction.apply)
    fields["id"] = fields["id"] if fields["id"] == request.id else hashlib.sha256(request.id.encode()).hexdigest()
    return msgspec.convert(fields | {"label": "free", "model": request.model}, ChatRequest), redaction


def _looked_through(fields: Any, detector: Detector, rewrite: Callable[[str, list[Finding]], str]) -> Any:
    """Every text rewritten with its findings. The limits of one text hold for all together. Raises Undecided."""
    checked = Counter[int]()
    chars = findings = 0

    def look(text: str) -> str:
        nonlocal chars, findings
        if (chars := chars + len(text)) > MAX_CHARS:
            raise Undecided(f"more characters than the {MAX_CHARS} that are looked through")
        found = detector.find(text, checked)
        if (findings := findings + len(found)) > MAX_FINDINGS:
            raise Undecided(f"more than {MAX_FINDINGS} findings")
        return rewrite(text, found)

    return _walk(fields, look)


def _user_fields(request: ChatRequest) -> dict[str, Any]:
    return {name: value for name, value in msgspec.to_builtins(request).items() if name not in _STRUCTURAL}


def _opening(request: ChatRequest) -> list[str]:
    """What all turns of a conversation have in common: everything up to the user's first message."""
    texts = [request.prompt or ""]
    for message in request.messages:
        texts += [message.role, message.content]
        if message.role == "user":
            break
    return texts


def _walk(value: Any, rewrite: Callable[[str], str]) -> Any:
    """`value`, made of JSON's kinds of value, with every text rewritten: names of fields too, since users choose
    some."""
    if isinstance(value, str):
        return rewrite(value)
    if isinstance(value, dict):
        return {_walk(key, rewrite): _walk(item, rewrite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(item, rewrite) for item in value]
    return value
