"""What an answer is kept under. A field that is new in ChatRequest counts from its first day: only what is named here
as neutral does not."""

import dataclasses
import hashlib
from typing import Final

import msgspec

from edge_agent.cache.base import Key, Scope
from shared.schemas import ChatRequest

SCHEME: Final = 1
"""Counted up when the same fields come to mean another answer: whatever was kept before is then never found."""
NEUTRAL: Final = frozenset({"id", "priority", "deadline_s", "scenario", "streamed"})
"""Fields of a request that say when it is answered and how it is read, not what is asked."""
KEYED: Final = tuple(name for name in ChatRequest.__struct_fields__ if name not in NEUTRAL)
TENANT_BYTES, DIGEST_BYTES = 16, 32


def key_of(request: ChatRequest, scope: Scope, *, secret: bytes = b"") -> Key:
    """The key of this request within this scope.

    With a `secret` (at most 64 bytes) nobody without it can tell, by trying, what a key that he sees was made of.
    """
    tenant = hashlib.blake2b(scope.tenant.encode(), digest_size=TENANT_BYTES, key=secret, person=b"tenant").digest()
    asked = {name: getattr(request, name) for name in KEYED}
    sampling = msgspec.structs.asdict(request.sampling)  # defaults spelled out: they may change
    asked["sampling"] = sampling | {"logit_bias": sorted(request.sampling.logit_bias.items())}
    covered = msgspec.msgpack.encode((SCHEME, dataclasses.astuple(scope), asked), order="deterministic")
    digest = hashlib.blake2b(covered, digest_size=DIGEST_BYTES, key=secret, person=b"answer").digest()
    return Key(tenant, digest, scope.label)
