"""What a cache of answers is made of: an entry, what is looked for, and what each layer of it must be able to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from router.clauses import CacheRules
from shared.schemas import ChatRequest, Delta, Label, Target

MAX_ENTRY_BYTES: Final = 1 << 20
"""A longer answer, encoded, is not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Within what an answer may be served again: to whom, how carefully handled, by which model."""

    tenant: str
    label: Label
    """The strictest that the request's own label and what was found in it ask for."""
    target: Target
    model: str
    weights: str = ""
    """Names the very bytes of the model, as far as that is known."""
    runtime: str = ""
    """Names what the device's settings change of its answers."""
    context_length: int | None = None
    redaction: str = ""
    """Names the rules by which personal data was replaced on the way out; empty where none was."""
    choice: int = 0
    """Which of a call's choices, where chance makes them different answers to the same request."""


@dataclass(frozen=True, slots=True)
class Key:
    """`digest` covers the scope and every field of the request that can change its answer; see `key_of`.

    `tenant` stands before it wherever a key is written, and is what a layer shares its room out by.
    """

    tenant: bytes
    digest: bytes
    label: Label

    @property
    def raw(self) -> bytes:
        return self.tenant + self.digest


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for, or put.

    A layer that matches exactly needs the key alone. One that matches approximately has the request itself, the scope
    that it must not step out of, and what the policy says; `key_of` of another request in the same scope says what
    that one would be kept under.
    """

    key: Key
    request: ChatRequest
    scope: Scope
    rules: CacheRules
    max_age_s: float | None = None
    """The caller takes nothing older."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer. `deltas` have no route; the last has `finish_reason` and `usage`. `created` counts in seconds
    since 1970, `ttl_s` from then."""

    deltas: tuple[Delta, ...]
    model: str
    target: Target
    created: float
    ttl_s: float


@dataclass(frozen=True, slots=True)
class LayerStats:
    """`entries` and `size` (bytes) are None where the layer cannot tell; `errors` counts what it could not do."""

    entries: int | None = None
    size: int | None = None
    evictions: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True)
class ApproximateStats(LayerStats):
    """Of a layer that may be wrong: answers from there that the caller asked anew at once, their share in all from
    there, and how often each guard kept apart what looked alike."""

    suspected: int = 0
    false_hit_rate: float = 0.0
    refused: Mapping[str, int] = field(default_factory=dict)


class Layer(Protocol):
    """One place where answers are kept. Nothing here raises or waits long: what cannot be done is a miss, and counted.

    Whoever asks a layer (`store.Store`) checks ages, counts hits and misses, and copies what a slower layer had into
    the faster ones, unless that layer matches approximately.
    """

    @property
    def name(self) -> str: ...

    @property
    def ttl_s(self) -> float:
        """Nothing older comes from here."""

    @property
    def exact(self) -> bool:
        """False: what `get` gives may be the answer to a similar request."""

    def takes(self, query: Query) -> bool:
        """Whether such an answer may lie here at all: asked before every `get` and `put`."""

    async def get(self, query: Query) -> Entry | None: ...

    async def put(self, query: Query, entry: Entry) -> None:
        """Returns at once; what takes time is done behind it."""

    async def clear(self) -> None: ...

    async def aclose(self) -> None: ...

    def stats(self) -> LayerStats: ...


def encoded(entry: Entry) -> bytes:
    return msgspec.msgpack.encode(entry)


def decoded(raw: bytes) -> Entry | None:
    """None for what `encoded` never made."""
    try:
        entry = msgspec.msgpack.decode(raw, type=Entry)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    whole = bool(entry.deltas) and entry.deltas[-1].finish_reason is not None
    return entry if whole else None
