"""The fastest layer: this process's memory, bounded in bytes. Room is made by dropping the least recently used answer
of whoever has the most: a tenant that floods the cache pushes out its own answers first."""

from collections import OrderedDict

from edge_agent.cache.base import MAX_ENTRY_BYTES, Entry, Layer, LayerStats, Query, decoded, encoded

ROW_BYTES = 400
"""What a key and its places in the tables take besides the answer."""


class MemoryLayer(Layer):
    """Answers lie here encoded, so that `max_bytes` is what they take."""

    name = "memory"
    exact = True

    def __init__(self, max_bytes: int, *, ttl_s: float = 3600.0) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._rows: dict[bytes, OrderedDict[bytes, bytes]] = {}
        """By tenant; each one's least recently used first."""
        self._sizes: dict[bytes, int] = {}
        self._evictions = 0

    @property
    def ttl_s(self) -> float:
        return self._ttl_s

    def takes(self, query: Query) -> bool:  # noqa: ARG002
        return True

    async def get(self, query: Query) -> Entry | None:
        key = query.key
        rows = self._rows.get(key.tenant)
        raw = rows.get(key.digest) if rows else None
        if rows is None or raw is None:
            return None
        rows.move_to_end(key.digest)
        return decoded(raw)

    async def put(self, query: Query, entry: Entry) -> None:
        raw, key = encoded(entry), query.key
        size = len(raw) + ROW_BYTES
        if len(raw) > MAX_ENTRY_BYTES or size > self._max_bytes:
            return
        rows = self._rows.setdefault(key.tenant, OrderedDict())
        self._forget(key.tenant, rows.pop(key.digest, None))
        rows[key.digest] = raw
        self._sizes[key.tenant] = self._sizes.get(key.tenant, 0) + size
        while sum(self._sizes.values()) > self._max_bytes:
            self._evict()

    async def clear(self) -> None:
        self._rows.clear()
        self._sizes.clear()

    async def aclose(self) -> None:
        await self.clear()

    def stats(self) -> LayerStats:
        entries = sum(len(rows) for rows in self._rows.values())
        return LayerStats(entries=entries, size=sum(self._sizes.values()), evictions=self._evictions)

    def _evict(self) -> None:
        tenant = max(self._sizes, key=self._sizes.__getitem__)
        rows = self._rows[tenant]
        _, raw = rows.popitem(last=False)
        self._forget(tenant, raw)
        self._evictions += 1
        if not rows:
            del self._rows[tenant], self._sizes[tenant]

    def _forget(self, tenant: bytes, raw: bytes | None) -> None:
        if raw is not None:
            self._sizes[tenant] -= len(raw) + ROW_BYTES
