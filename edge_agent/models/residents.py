"""One model in memory, or on its way there, and how it looks to who asks. What is loaded when, the library decides."""

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import msgspec

from edge_agent.backends.base import LoadableBackend, Loaded, LocalReading
from edge_agent.models.memory import MOST_SLOTS, NOTHING, Need
from edge_agent.models.shelf import Entry
from shared.errors import Overloaded
from shared.schemas import ChatRequest, ModelCard


@dataclass(frozen=True, slots=True)
class Rules:
    """`slots` (none: see `slots_for`), `context` and `prefix_bytes` are of each model; `queue` is how many may wait for
    one to be loaded, `keep_s` how long it stays without work."""

    slots: int | None = None
    context: int | None = None
    queue: int = 64
    keep_s: float | None = 300.0
    prefix_bytes: int = 0

    @property
    def most_slots(self) -> int:
        return self.slots or MOST_SLOTS


@dataclass(slots=True, eq=False)
class Resident:
    """A model that is loaded or being loaded. `users` answer, or wait for the load to end."""

    entry: Entry
    keep_s: float | None
    idle_since: float
    ready: "asyncio.Task[LoadableBackend]" = field(init=False)
    need: Need = NOTHING
    slots: int = 0
    users: int = 0
    loaded_at: datetime | None = None
    files: ExitStack = field(default_factory=ExitStack)

    @property
    def backend(self) -> LoadableBackend | None:
        return self.ready.result() if self.ready.done() and not failed(self.ready) else None

    @property
    def needs(self) -> Need:
        """With what it has taken of it so far."""
        return replace(self.need, taken=self.backend.taken()) if self.backend else self.need

    @property
    def idle(self) -> bool:
        return self.ready.done() and not self.users

    @property
    def due(self) -> float | None:
        """When it is to be unloaded, if it stays idle."""
        return None if self.keep_s is None else self.idle_since + self.keep_s

    def is_due(self, now: float) -> bool:
        return self.idle and self.due is not None and self.due <= now

    async def until_ready(self) -> LoadableBackend:
        """Who leaves meanwhile takes nothing away from the others that wait."""
        try:
            return await asyncio.shield(self.ready)
        except asyncio.CancelledError:
            if self.ready.cancelled():
                raise Overloaded("the edge agent is stopping", source="edge", retry_after=1) from None
            raise

    def described(self, now: float, today: datetime) -> Loaded:
        """The same moment by both clocks."""
        backend, due = self.backend, self.due
        return Loaded(
            name=self.entry.name,
            file=self.entry.file,
            state="loaded" if backend else "loading",
            size=self.need.total,
            file_size=self.need.file,
            context_length=backend.model_card().context_length if backend else self.entry.context_length,
            running=self.users,
            processor="cpu",
            loaded_at=self.loaded_at,
            expires_at=None if due is None or not self.idle else today + timedelta(seconds=due - now),
            stays=due is None,
        )


def failed(task: "asyncio.Task[LoadableBackend]") -> bool:
    """Looking at the exception also tells the loop that somebody has: nobody need be waiting for a load."""
    return task.cancelled() or task.exception() is not None


@dataclass(frozen=True, slots=True)
class Absent:
    """The reading of a model that is not in memory: the next request loads it."""

    queue_depth: int
    queue_capacity: int
    slots: int
    available: bool = True
    running: int = 0
    tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    restarts: int = 0
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """A LocalView: one model as it is at this moment."""

    entry: Entry
    resident: Resident | None
    rules: Rules

    @property
    def _backend(self) -> LoadableBackend | None:
        return self.resident.backend if self.resident else None

    def model_card(self) -> ModelCard:
        if self.resident and self._backend:
            return msgspec.structs.replace(self._backend.model_card(), digest=self.resident.entry.digest)
        return ModelCard(id=self.entry.name, context_length=self.entry.context_length, digest=self.entry.digest)

    def reading(self) -> LocalReading:
        if self._backend:
            return self._backend.reading()
        return Absent(self.resident.users if self.resident else 0, self.rules.queue, self.rules.most_slots)

    async def count_tokens(self, request: ChatRequest) -> int:
        """Raises Overloaded if it is not loaded."""
        if self._backend is None:
            raise Overloaded(f"{self.entry.name} is not loaded", source="edge", retry_after=1)
        return await self._backend.count_tokens(request)
