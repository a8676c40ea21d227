"""Who is let in while the daemon runs, and the wait for the last of them when it stops."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from typing import Protocol

from edge_agent.caller import ANYONE, Caller
from shared.errors import Overloaded
from shared.schemas import Answer, ChatRequest, Delta


class CallerAnswer(Protocol):
    """An `Answer` that is told who asks."""

    def answer(self, request: ChatRequest, caller: Caller = ANYONE) -> AsyncGenerator[Delta, None]: ...


class Intake:
    """Counts what runs behind it and, once draining, takes nothing new."""

    def __init__(self, answer: CallerAnswer) -> None:
        self._answer = answer
        self._idle = asyncio.Event()
        self._idle.set()
        self.running = 0
        self.draining = False

    def of(self, caller: Caller) -> Answer:
        """The `Answer` for one call of this caller. Several requests through it are the choices of that call."""
        return _Call(self, caller)

    async def answer(self, request: ChatRequest, caller: Caller = ANYONE) -> AsyncGenerator[Delta, None]:
        """Raises Overloaded while draining; otherwise what the answer behind it raises."""
        if self.draining:
            raise Overloaded("the edge agent is stopping", source="edge", retry_after=1)
        self.running += 1
        self._idle.clear()
        try:
            async with aclosing(self._answer.answer(request, caller)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    async def drain(self) -> None:
        """Returns when nothing runs any more."""
        self.draining = True
        await self._idle.wait()


class _Call:
    def __init__(self, intake: Intake, caller: Caller) -> None:
        self._intake = intake
        self._caller = caller
        self._choices = count()

    def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        return self._intake.answer(request, replace(self._caller, choice=next(self._choices)))
