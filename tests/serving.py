"""A real server on port 0 inside the test's own loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from waiting import HANG_S

from shared.serving import serve


@asynccontextmanager
async def served(app: Any, **options: Any) -> AsyncIterator[int]:
    """Serve an ASGI app with the daemons' own `serve`; yields the port once it listens."""
    stop = asyncio.Event()
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(app, "127.0.0.1", 0, on_listening=listening.set_result, stop=stop, **options))
    try:
        async with asyncio.timeout(HANG_S):
            await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield int(listening.result().rpartition(":")[2])
    finally:
        stop.set()
        async with asyncio.timeout(HANG_S):
            await task
