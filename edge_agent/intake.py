"""Who is let in while the daemon runs, and the wait for the last of them when it stops."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from shared.errors import Overloaded
from shared.schemas import ChatRequest, Delta


class TenantsAnswer(Protocol):
    """An `Answer` that is told whose request it is; empty where clients show no key."""

    def answer(self, request: ChatRequest, tenant: str = "") -> AsyncGenerator[Delta, None]: ...


@dataclass(frozen=True, slots=True)
class ForTenant:
    """An `Answer` to one tenant's requests."""

    behind: TenantsAnswer
    tenant: str

    def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        return self.behind.answer(request, self.tenant)


class Intake:
    """Counts what runs behind it and, once draining, takes nothing new."""

    def __init__(self, answer: TenantsAnswer) -> None:
        self._answer = answer
        self._idle = asyncio.Event()
        self._idle.set()
        self.running = 0
        self.draining = False

    async def answer(self, request: ChatRequest, tenant: str = "") -> AsyncGenerator[Delta, None]:
        """Raises Overloaded while draining; otherwise what the answer behind it raises."""
        if self.draining:
            raise Overloaded("the edge agent is stopping", source="edge", retry_after=1)
        self.running += 1
        self._idle.clear()
        try:
            async with aclosing(self._answer.answer(request, tenant)) as deltas:
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
