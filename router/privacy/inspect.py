"""What of a whole request is private: every text in it is looked through, and the same walk puts placeholders in.

There is one walk for both, over all fields but those that hold no user's text, so that a field added tomorrow is looked
through from its first day, and nothing that was found can be missed when it is replaced.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
import re2

from router.privacy.detect import MAX_CHARS, MAX_FINDINGS, Detector, Finding, Undecided, apart
from router.privacy.redact import Redaction, conversation_key, plain_of
from shared.schemas import ChatRequest, Grammar

_STRUCTURAL: Final = frozenset({"model", "label", "role", "syntax", "tool_choice", "priority", "scenario"})
"""Fields whose text is the protocol's, or which are never sent."""
_BARE: Final = frozenset({int, float, bool})
"""What holds no text."""
_JSON: Final = frozenset({"arguments", "parameters"})
"""Fields whose text is JSON, and must still be when it is redacted."""
MIN_REPEATED: Final = 4
"""A value of fewer characters is replaced where it was found, and nowhere else."""

Rewrite = Callable[[str, bool], str]
"""Of a text, and whether that is JSON, what is to stand in its place."""
T = TypeVar("T")


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
    try:
        found = [finding for _, findings in _looked_through(request, detector) for finding in findings]
    except Undecided as error:
        return Privacy(undecided=str(error))
    except Exception as error:  # a detector that breaks has found nothing out
        return Privacy(undecided=f"the detector failed: {type(error).__name__}")
    return Privacy(tuple(sorted({one.kind for one in found})), any(one.secret for one in found))


def redacted(request: ChatRequest, detector: Detector, secret: bytes) -> tuple[ChatRequest, Redaction]:
    """The request with a placeholder for each finding, and wherever else the same value stands: what an identity number
    is can show in one sentence only. Labelled free, and the way back. `secret` is the device's. Raises Undecided where
    `inspect` would say so, and BadRequest where a text with placeholders is too long for its field."""
    looked = _looked_through(request, detector)
    redaction = Redaction(conversation_key(secret, _opening(request)), [text for text, _ in looked])
    repeats = _repeats(looked)
    following = iter(looked)

    def hide(text: str, as_json: bool) -> str:
        _, findings = next(following)
        return redaction.apply(text, apart([*findings, *repeats(text)], text), as_json=as_json)

    hidden = _walk(request, hide)
    key = request.id if hidden.id == request.id else hashlib.sha256(request.id.encode()).hexdigest()
    return msgspec.structs.replace(hidden, id=key, label="free"), redaction


def _looked_through(request: ChatRequest, detector: Detector) -> list[tuple[str, list[Finding]]]:
    """Every text in the order of the walk, with its findings. The limits of one text hold for all together. Raises
    Undecided."""
    checked = Counter[int]()
    chars = count = 0
    looked: list[tuple[str, list[Finding]]] = []

    def look(text: str, _: bool) -> str:
        nonlocal chars, count
        if (chars := chars + len(text)) > MAX_CHARS:
            raise Undecided(f"more characters than the {MAX_CHARS} that are looked through")
        found = detector.find(text, checked)
        if (count := count + len(found)) > MAX_FINDINGS:
            raise Undecided(f"more than {MAX_FINDINGS} findings")
        looked.append((text, found))
        return text

    _walk(request, look)
    return looked


def _repeats(looked: Iterable[tuple[str, list[Finding]]]) -> Callable[[str], list[Finding]]:
    """Where in a text stands what was found somewhere, in plain characters or as JSON writes it."""
    found: dict[str, Finding] = {}
    for text, findings in looked:
        for one in findings:
            written = text[one.start : one.end]
            for spelling in (written, plain_of(written), json.dumps(plain_of(written), ensure_ascii=False)[1:-1]):
                if len(spelling) >= MIN_REPEATED and one.kind != "word":  # the detector finds words wherever they are
                    found.setdefault(spelling, one)
    if not found:
        return lambda _: []
    pattern = _any_of(found)

    def places(text: str) -> list[Finding]:
        matches = [(match, found[match.group()]) for match in pattern.finditer(text)]
        return [Finding(match.start(), match.end(), one.kind, one.secret) for match, one in matches]

    return places


def _any_of(values: Mapping[str, object]) -> Any:
    """Not within a longer word or number."""
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 64 << 20
    options.longest_match = True
    return re2.compile("|".join(_whole(value) for value in values), options)


def _whole(value: str) -> str:
    first, last = (r"\b" if char.isascii() and char.isalnum() else "" for char in (value[0], value[-1]))
    return first + str(re2.escape(value)) + last


def _opening(request: ChatRequest) -> list[str]:
    """What all turns of a conversation have in common: everything up to the user's first message."""
    texts = [request.prompt or ""]
    for message in request.messages:
        texts += [message.role, message.content]
        if message.role == "user":
            break
    return texts


def _walk(value: T, rewrite: Rewrite, field: str = "") -> T:
    """`value`, a struct or made of JSON's kinds of value, with every text in it rewritten: keys of maps too, since
    users choose some. What nothing changes is the same object."""
    return _walked(value, rewrite, field)  # type: ignore[no-any-return]


def _is_schema(value: msgspec.Struct) -> bool:
    return isinstance(value, Grammar) and value.syntax == "json_schema"


@functools.cache
def _walked_fields(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    return tuple(name for name in kind.__struct_fields__ if name not in _STRUCTURAL)


def _walked(value: Any, rewrite: Rewrite, field: str) -> Any:
    if isinstance(value, str):
        return rewrite(value, field in _JSON)
    if isinstance(value, msgspec.Struct):
        changed = {}
        for name in _walked_fields(type(value)):
            before = getattr(value, name)  # what is empty holds no text, nor does a number
            field = "parameters" if name == "text" and _is_schema(value) else name
            if before and type(before) not in _BARE and (now := _walked(before, rewrite, field)) is not before:
                changed[name] = now
        return msgspec.structs.replace(value, **changed) if changed else value
    if isinstance(value, tuple | list):
        items = tuple(_walked(item, rewrite, field) for item in value)
        return value if all(now is before for now, before in zip(items, value, strict=True)) else items
    if isinstance(value, dict):
        pairs = {_walked(key, rewrite, ""): _walked(item, rewrite, "") for key, item in value.items()}
        return value if pairs == value else pairs
    return value
