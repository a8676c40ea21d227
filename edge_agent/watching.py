"""Ticks that say: something may have happened to this file."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path


async def ticks(path: Path, every: float) -> AsyncIterator[None]:
    """Its folder is watched, since editors replace files; and looked at each `every` seconds, since not every file
    system tells."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):  # not installed, no folder, out of watches
        from watchfiles import awatch

        timeout = int(every * 1000)
        async for _ in awatch(
            path.parent, watch_filter=None, recursive=False, rust_timeout=timeout, yield_on_timeout=True
        ):
            yield
    while True:
        await asyncio.sleep(every)
        yield
