"""The second layer: a file that outlives the process, on a thread of its own. The event loop never waits for it longer
than `patience_s`: what takes longer is a miss."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from edge_agent.cache.base import Entry, Layer, LayerStats, Query
from edge_agent.cache.file import AnswerFile
from edge_agent.cache.rows import Rows

MAX_PENDING: Final = 64
"""Works that wait for the thread; beyond, nothing is looked up or kept."""
CLOSE_S: Final = 5.0

T = TypeVar("T")


class DiskLayer(Layer):
    """Where rows are not sealed, only answers to `free` requests are kept: nothing personal lies there in the clear."""

    name = "disk"
    exact = True

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        *,
        rows: Rows,
        ttl_s: float = 604_800.0,
        patience_s: float = 0.25,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = AnswerFile(path, max_bytes, clock=clock)
        self._rows = rows
        self._ttl_s = ttl_s
        self._patience_s = patience_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._room = threading.Semaphore(MAX_PENDING)
        self._lost = 0

    @property
    def ttl_s(self) -> float:
        return self._ttl_s

    def takes(self, query: Query) -> bool:
        return self._rows.sealed or query.scope.label == "free"

    async def get(self, query: Query) -> Entry | None:
        row = await self._done(lambda: self._file.get(query.key), self._patience_s)
        return None if row is None else self._rows.entry(query.key, row)

    async def put(self, query: Query, entry: Entry) -> None:
        expires = entry.created + min(entry.ttl_s, self._ttl_s)
        self._submit(lambda: self._keep(query, entry, expires))

    async def clear(self) -> None:
        await self._done(self._file.clear, CLOSE_S)

    async def flush(self) -> None:
        """Wait until what was put has been tried."""
        await self._done(lambda: None, CLOSE_S)

    async def aclose(self) -> None:
        """What was put is written first."""
        await self._done(self._file.close, CLOSE_S)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def stats(self) -> LayerStats:
        file = self._file
        return LayerStats(file.entries, file.size, file.evictions, file.failures + self._lost)

    def _keep(self, query: Query, entry: Entry, expires: float) -> None:
        row = self._rows.row(query.key, entry)
        if row is not None:
            self._file.put(query.key, row, expires)

    async def _done(self, work: Callable[[], T], seconds: float) -> T | None:
        future = self._submit(work)
        if future is None:
            return None
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
        except TimeoutError:
            self._lost += 1
            return None

    def _submit(self, work: Callable[[], T]) -> "Future[T] | None":
        if not self._room.acquire(blocking=False):
            self._lost += 1
            return None
        try:
            future = self._thread.submit(work)
        except RuntimeError:  # closed
            self._room.release()
            return None
        future.add_done_callback(lambda _: self._room.release())
        return future
