"""The optional layer that devices share: a Redis server. Only answers to `free` requests, sealed if there is a secret.

It is asked with patience for some tens of milliseconds. After a few failures in a row it is left alone for a while,
longer each time; meanwhile it is as if it held nothing.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from edge_agent.cache.base import Entry, Key, Layer, LayerStats, Query
from edge_agent.cache.rows import MAX_ROW_BYTES, Rows

PREFIX: Final = b"causeway:answer:1:"
"""In front of every key, its number counted up when rows come to be written otherwise."""
CONNECTIONS: Final = 8
MAX_PUTS: Final = 32
FAILURES: Final = 3
COOL_DOWN_S: Final = 2.0
MAX_COOL_DOWN_S: Final = 60.0
CLEAR_S: Final = 10.0
CLEAR_BATCH: Final = 500

T = TypeVar("T")


class RedisLayer(Layer):
    """`url`: `redis://`, `rediss://` or `unix://`. Belongs to the loop that first uses it."""

    name = "redis"
    exact = True

    def __init__(
        self,
        url: str,
        *,
        password: str | None = None,
        rows: Rows,
        ttl_s: float = 86_400.0,
        patience_s: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis: Redis = Redis.from_url(
            url,
            password=password,
            socket_timeout=patience_s,
            socket_connect_timeout=patience_s,
            retry=Retry(NoBackoff(), 0),
            max_connections=CONNECTIONS,
        )
        self._connections = asyncio.Semaphore(CONNECTIONS)
        self._rows = rows
        self._ttl_s = ttl_s
        self._patience_s = patience_s
        self._clock = clock
        self._puts: set[asyncio.Task[None]] = set()
        self._failures = 0
        self._errors = 0
        self._cool_down_s = COOL_DOWN_S
        self._back_at = float("-inf")

    @property
    def ttl_s(self) -> float:
        return self._ttl_s

    def takes(self, query: Query) -> bool:
        return query.scope.label == "free" and query.rules.shared

    async def get(self, query: Query) -> Entry | None:
        row = await self._tried(lambda: self._redis.getrange(_name(query.key), 0, MAX_ROW_BYTES), self._patience_s)
        return self._rows.entry(query.key, row) if row else None

    async def put(self, query: Query, entry: Entry) -> None:
        row, ttl_ms = self._rows.row(query.key, entry), int(min(self._ttl_s, entry.ttl_s) * 1000)
        if row is None or ttl_ms < 1 or len(self._puts) >= MAX_PUTS:
            return
        task = asyncio.create_task(self._put(query.key, row, ttl_ms))
        self._puts.add(task)
        task.add_done_callback(self._puts.discard)

    async def clear(self) -> None:
        """For all who share it."""
        await self._tried(self._unlink_all, CLEAR_S)

    async def flush(self) -> None:
        """Wait until what was put has been tried."""
        await asyncio.gather(*self._puts)

    async def aclose(self) -> None:
        await self.flush()
        await self._redis.aclose()

    def stats(self) -> LayerStats:
        return LayerStats(errors=self._errors)

    async def _put(self, key: Key, row: bytes, ttl_ms: int) -> None:
        await self._tried(lambda: self._redis.set(_name(key), row, px=ttl_ms), self._patience_s)

    async def _unlink_all(self) -> None:
        batch: list[Any] = []
        async for name in self._redis.scan_iter(match=PREFIX + b"*", count=CLEAR_BATCH):
            batch.append(name)
            if len(batch) >= CLEAR_BATCH:
                await self._redis.unlink(*batch)
                batch.clear()
        if batch:
            await self._redis.unlink(*batch)

    async def _tried(self, work: Callable[[], Awaitable[T]], seconds: float) -> T | None:
        if self._clock() < self._back_at:
            return None
        try:
            async with asyncio.timeout(seconds), self._connections:
                done = await work()
        except ResponseError:  # it is there, and refuses this: out of memory, read only, another type under this key
            self._errors += 1
            return None
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)
            return None
        self._failures, self._cool_down_s = 0, COOL_DOWN_S
        return done

    def _failed(self, error: Exception) -> None:
        self._errors += 1
        self._failures += 1
        if self._failures < FAILURES:
            return
        self._back_at = self._clock() + self._cool_down_s
        self._cool_down_s = min(2 * self._cool_down_s, MAX_COOL_DOWN_S)
        if self._failures == FAILURES:
            structlog.get_logger("causeway.cache").warning("redis is left alone", error=type(error).__name__)


def _name(key: Key) -> bytes:
    return PREFIX + key.tenant.hex().encode() + b":" + key.digest.hex().encode()
