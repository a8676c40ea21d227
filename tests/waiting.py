"""Waiting for what must come. The limit ends a test that hangs; it says nothing of how long anything may take."""

import asyncio
from collections.abc import Callable
from typing import Final

HANG_S: Final = 120.0


async def until(true: Callable[[], bool]) -> None:
    """For what announces itself by no event."""
    async with asyncio.timeout(HANG_S):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
