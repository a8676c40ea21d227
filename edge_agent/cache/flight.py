"""One execution that several identical requests follow, each from its first delta on.

It runs in a task of its own, so that whoever asked first may leave; it is cancelled when the last follower has left.
What it produces is kept for those who join late. Beyond MAX_HELD bytes it takes nobody new, keeps only what somebody
has yet to read, and waits for the slowest: memory is bounded, and no follower loses a word.
"""

import asyncio
import copy
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from contextlib import aclosing
from typing import Final

from shared.errors import CausewayError
from shared.schemas import Delta

MAX_HELD: Final = 4 << 20

Generate = Callable[[], AsyncGenerator[Delta, None]]
Complete = Callable[[tuple[Delta, ...]], Awaitable[None]]


class Flight:
    """`complete` is called with the whole answer, before its last delta is passed on; not at all if it has no end, or
    grew too long to be held; `over` once nobody can join it any more."""

    def __init__(
        self, generate: Generate, complete: Complete, *, over: Callable[[], None], max_held: int = MAX_HELD
    ) -> None:
        self._generate = generate
        self._complete = complete
        self._over = over
        self._max_held = max_held
        self._task: asyncio.Task[None] | None = None
        self._log: list[Delta] = []
        self._dropped = 0
        self._held = 0
        self._whole = True
        self._ended = False
        self._error: Exception | None = None
        self._positions: dict[asyncio.Event, int] = {}
        """How many deltas each follower has taken, by what wakes it."""
        self._taken = asyncio.Event()

    @property
    def joinable(self) -> bool:
        return self._whole and not self._ended

    async def follow(self) -> AsyncGenerator[Delta, None]:
        """The answer from its first delta on. Raises what ended it."""
        woken = asyncio.Event()
        self._positions[woken] = 0
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            while (delta := await self._next(woken)) is not None:
                yield delta
            if self._error is not None:
                raise _own(self._error)
        finally:
            del self._positions[woken]
            self._taken.set()
            if not self._positions:
                await self._abandon()

    async def _next(self, woken: asyncio.Event) -> Delta | None:
        while (at := self._positions[woken] - self._dropped) >= len(self._log):
            if self._ended:
                return None
            woken.clear()
            await woken.wait()
        self._positions[woken] += 1
        self._taken.set()
        return self._log[at]

    async def _run(self) -> None:
        try:
            async with aclosing(self._generate()) as deltas:
                async for delta in deltas:
                    await self._push(delta)
                    if delta.finish_reason is not None:
                        break
        except Exception as error:
            self._error = error
        finally:
            self._end()
            self._wake()

    async def _push(self, delta: Delta) -> None:
        if delta.finish_reason is not None and self._whole:
            await self._complete((*self._log, delta))
            self._end()  # with this delta: who comes now finds it kept
        self._log.append(delta)
        self._held += _size(delta)
        self._wake()
        while self._held > self._max_held and not self._ended:
            self._whole = False
            self._over()
            self._taken.clear()
            self._drop()
            if self._held > self._max_held:
                await self._taken.wait()

    def _drop(self) -> None:
        """What every follower has taken."""
        read = min(self._positions.values(), default=self._dropped) - self._dropped
        self._held -= sum(_size(delta) for delta in self._log[:read])
        del self._log[:read]
        self._dropped += read

    def _wake(self) -> None:
        for woken in self._positions:
            woken.set()

    async def _abandon(self) -> None:
        """Nobody follows any more: returns when the work has stopped."""
        self._end()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._over()


def _own(error: Exception) -> Exception:
    """Each follower's own copy of a typed error: what one says more of it, another must not read."""
    return copy.copy(error) if isinstance(error, CausewayError) else error


class Flights:
    """The executions under way, by what makes requests identical."""

    def __init__(self, *, max_held: int = MAX_HELD) -> None:
        self._open: dict[Hashable, Flight] = {}
        self._max_held = max_held

    def __len__(self) -> int:
        return len(self._open)

    def joinable(self, name: Hashable) -> bool:
        return name in self._open and self._open[name].joinable

    async def follow(self, name: Hashable, generate: Generate, complete: Complete) -> AsyncGenerator[Delta, None]:
        """Join the execution of this name, or begin it. With the name None it is nobody else's."""
        flight = self._open.get(name)
        if flight is None or not flight.joinable:
            flight = Flight(generate, complete, over=lambda: self._over(name, flight), max_held=self._max_held)
            if name is not None:
                self._open[name] = flight
        async with aclosing(flight.follow()) as deltas:
            async for delta in deltas:
                yield delta

    def _over(self, name: Hashable, flight: Flight | None) -> None:
        if self._open.get(name) is flight:
            self._open.pop(name, None)


def _size(delta: Delta) -> int:
    """About what it takes in memory."""
    if not (delta.logprobs or delta.tool_calls):
        return 256 + len(delta.text)
    tops = sum(len(token.top) + 1 for token in delta.logprobs)
    return 256 + len(delta.text) + 256 * tops + sum(len(piece.arguments) + 128 for piece in delta.tool_calls)
