"""Responses that may be asked for again or gone on from: in memory only, bounded in bytes and time, a tenant's own."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_agent.api.responses.read import Turn
from shared.errors import BadRequest, NotFound

MAX_BYTES = 32 << 20
TENANT_BYTES = 8 << 20
TTL_S = 3600.0
OVERHEAD = 1024
"""Bytes of an entry beside its texts, roughly."""


class PreviousNotFound(BadRequest):
    code = "previous_response_not_found"


@dataclass(frozen=True, slots=True)
class Stored:
    """`body` is the response object as it was given, `size` the bytes of all that is kept for it."""

    body: dict[str, Any]
    inputs: list[dict[str, Any]]
    turn: Turn
    size: int


class ResponseStore:
    """The oldest go first: a tenant's own where it has too many, anybody's where all together have."""

    def __init__(
        self,
        *,
        max_bytes: int = MAX_BYTES,
        tenant_bytes: int = TENANT_BYTES,
        ttl_s: float = TTL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._tenant_bytes = tenant_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], tuple[float, Stored]] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def put(self, tenant: str, response_id: str, stored: Stored) -> None:
        """What is larger than a tenant's share is not kept."""
        if stored.size > self._tenant_bytes:
            return
        self._entries[tenant, response_id] = (self._clock() + self._ttl_s, stored)
        self._sizes[tenant] = self._sizes.get(tenant, 0) + stored.size
        self._expire()
        while self._sizes.get(tenant, 0) > self._tenant_bytes:
            self._drop(next(key for key in self._entries if key[0] == tenant))
        while sum(self._sizes.values()) > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def get(self, tenant: str, response_id: str) -> Stored:
        """Raises NotFound, also for another tenant's."""
        self._expire()
        found = self._entries.get((tenant, response_id))
        if found is None:
            raise NotFound("no such response, or no longer", param="response_id", source="edge")
        return found[1]

    def delete(self, tenant: str, response_id: str) -> None:
        """Raises NotFound."""
        self.get(tenant, response_id)
        self._drop((tenant, response_id))

    def turn(self, tenant: str, response_id: str) -> Turn:
        """Raises PreviousNotFound."""
        try:
            return self.get(tenant, response_id).turn
        except NotFound:
            raise PreviousNotFound(
                "no such response, or no longer: send the conversation in input", param="previous_response_id"
            ) from None

    def _expire(self) -> None:
        """All live equally long, so the oldest are the first to go."""
        now = self._clock()
        while self._entries and next(iter(self._entries.values()))[0] <= now:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple[str, str]) -> None:
        _, stored = self._entries.pop(key)
        self._sizes[key[0]] -= stored.size
        if not self._sizes[key[0]]:
            del self._sizes[key[0]]
