"""The n choices of one call, answered at the same time, as one stream."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from shared.schemas import Answer, ChatRequest, Delta

MERGE_QUEUE = 16
"""Deltas that wait for a slow reader, of all choices together."""


async def merged(answer: Answer, requests: Sequence[ChatRequest]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of all choices, each with its index, as they come. The first error ends all."""
    if len(requests) == 1:
        async with aclosing(answer.answer(requests[0])) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue(MERGE_QUEUE)
    pumps = [asyncio.create_task(_pump(answer, request, at, queue)) for at, request in enumerate(requests)]
    try:
        left = len(pumps)
        while left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    answer: Answer, request: ChatRequest, index: int, queue: asyncio.Queue[tuple[int, Delta | Exception | None]]
) -> None:
    end: Exception | None = None
    try:
        async with aclosing(answer.answer(request)) as deltas:
            async for delta in deltas:
                await queue.put((index, delta))
    except Exception as error:
        end = error
    await queue.put((index, end))
