"""The models of this device behind one door: each is loaded at its first request, shared by all that ask for it, and
unloaded when it has been idle for long enough or another one needs its memory.

    absent -> loading -> loaded <-> answering        users > 0: it loads or answers, and nobody takes it away
                 |          |
              (failed)   unloading -> absent         idle for `keep_s`, stopped, or evicted: least recently used first

Loads and unloads happen one at a time, so that memory is counted once. Everything else is plain reading and counting on
the event loop.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
import structlog

from edge_agent.backends.base import LoadableBackend, Loaded, LocalReading
from edge_agent.errors import NotEnoughMemory
from edge_agent.facts import facts_of
from edge_agent.locks import held
from edge_agent.models.memory import MOST_SLOTS, NOTHING, Memory, Need, need, slots_for
from edge_agent.models.shelf import Entry, Shelf
from shared.errors import CausewayError, Overloaded, UnknownModel, UpstreamFailed
from shared.models import verify
from shared.schemas import ChatRequest, Delta, ModelCard

LOAD_S: Final = 600.0
"""Limit on loading one model; only a disk that has died takes as long."""
UNLOAD_S: Final = 60.0
BUSY_RETRY_S: Final = 5.0

Open = Callable[[Path, int], LoadableBackend]
"""A model's file, and how many slots it has."""


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
class _Resident:
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
        return self.ready.result() if self.ready.done() and not _failed(self.ready) else None

    @property
    def needs(self) -> Need:
        """With what it has taken of it so far."""
        return replace(self.need, taken=self.backend.taken()) if self.backend else self.need

    @property
    def idle(self) -> bool:
        return self.ready.done() and not self.users


class Library:
    """A LocalModels: an `Answer` for every chat model of the store. Belongs to the event loop that it is used on.

    `auto`, `edge` and every name that is not of this device mean the default model, the `model` of the settings. That
    one is loaded by `start` and stays, unless it is stopped or evicted; then its next request loads it again.
    """

    def __init__(
        self,
        default: Path,
        store: Path,
        open_backend: Open,
        *,
        memory: Memory,
        rules: Rules | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._rules = rules or Rules()
        self._shelf = Shelf(default, store, self._rules.context)
        self._open = open_backend
        self._memory = memory
        self._clock = clock
        self._wall_clock = wall_clock
        self._residents: dict[str, _Resident] = {}
        self._kept: dict[str, float | None] = {}
        self._moving = asyncio.Lock()
        self._changed = asyncio.Event()
        self._closed = False
        self._hashed: set[tuple[int, int, int]] = set()

    @property
    def store(self) -> Path:
        return self._shelf.store

    async def start(self) -> None:
        """Load the default model. Raises what keeps it from being loaded."""
        await self.load(self._shelf.default.name)

    async def aclose(self) -> None:
        """Ends what is running, unloads everything; idempotent."""
        self._closed = True
        for resident in self._residents.values():
            resident.ready.cancel()
        await asyncio.gather(*(resident.ready for resident in self._residents.values()), return_exceptions=True)
        async with self._moving:
            for resident in list(self._residents.values()):
                await self._unload(resident)

    # --- answering ----------------------------------------------------------------------------------------------------

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        """Raises what the model does, or what keeps it from being loaded: ModelInvalid, NotEnoughMemory, Overloaded."""
        async with (
            self._in_use(self._shelf.find(request.model)) as backend,
            aclosing(backend.answer(request)) as deltas,
        ):
            async for delta in deltas:
                yield delta

    async def count_tokens(self, request: ChatRequest) -> int:
        """By the tokenizer of the model that would answer, which is loaded if need be."""
        async with self._in_use(self._shelf.find(request.model)) as backend:
            return await backend.count_tokens(request)

    def named(self, model: str) -> "View":
        """The model that would answer to this name, as it is now. Loads nothing."""
        entry = self._shelf.find(model)
        return View(entry, self._residents.get(entry.name), self._rules)

    def model_card(self) -> ModelCard:
        return self.named("auto").model_card()

    def reading(self) -> LocalReading:
        return self.named("auto").reading()

    def model_cards(self) -> tuple[ModelCard, ...]:
        """The default first, then the others of the store by name."""
        return tuple(self.named(entry.name).model_card() for entry in self._shelf.entries())

    # --- loading and unloading ----------------------------------------------------------------------------------------

    def loaded(self) -> list[Loaded]:
        return [self._described(self._residents[name]) for name in sorted(self._residents)]

    async def load(self, name: str) -> None:
        """See LocalModels."""
        async with self._in_use(self._shelf.entry(name)):
            pass

    def keep(self, name: str, seconds: float | None) -> None:
        """See LocalModels."""
        with suppress(UnknownModel):
            entry = self._shelf.entry(name)
            if resident := self._residents.get(entry.name):
                resident.keep_s = seconds
                self._changed.set()
            else:
                self._kept[entry.name] = seconds

    async def stop(self, name: str) -> bool:
        """See LocalModels."""
        resident = self._residents.get(name)
        if resident is None:
            raise UnknownModel(f"{name} is not loaded", param="name", source="edge")
        resident.keep_s = 0
        await self.expire()
        return self._residents.get(name) is not resident

    async def expire(self) -> None:
        """Unload what has been idle for long enough."""
        if not any(self._is_due(resident) for resident in self._residents.values()):
            return
        async with self._moving:
            for resident in [found for found in self._residents.values() if self._is_due(found)]:
                if self._is_due(resident):
                    await self._unload(resident)

    async def watch(self) -> None:
        """Unload for ever what is due; ends only by being cancelled."""
        while True:
            self._changed.clear()
            due = [at for found in self._residents.values() if found.idle and (at := self._due(found)) is not None]
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(due) - self._clock()) if due else None):
                    await self._changed.wait()
            await self.expire()

    @asynccontextmanager
    async def _in_use(self, entry: Entry) -> AsyncIterator[LoadableBackend]:
        """The model, loaded, for as long as the body runs. Who leaves while it loads leaves it to the others."""
        resident = self._residents.get(entry.name) or self._begin(entry)
        if not resident.ready.done() and resident.users >= self._rules.most_slots + self._rules.queue:
            raise Overloaded(f"too many wait for {entry.name} to be loaded", source="edge", retry_after=BUSY_RETRY_S)
        resident.users += 1
        try:
            yield await _until_ready(resident)
        finally:
            resident.users -= 1
            resident.idle_since = self._clock()
            self._changed.set()

    def _begin(self, entry: Entry) -> _Resident:
        if self._closed:
            raise Overloaded("the edge agent is stopping", source="edge", retry_after=1)
        keep_s = None if entry.name == self._shelf.default.name else self._rules.keep_s
        resident = _Resident(entry, self._kept.pop(entry.name, keep_s), self._clock())
        self._residents[entry.name] = resident
        resident.ready = asyncio.create_task(self._load(resident))
        resident.ready.add_done_callback(_failed)
        return resident

    async def _load(self, resident: _Resident) -> LoadableBackend:
        name = resident.entry.name
        try:
            async with self._moving:
                resident.need = await asyncio.to_thread(self._checked, resident)
                await self._make_room(resident)
                began = self._clock()
                backend = await self._started(resident)
        except BaseException as error:
            del self._residents[name]
            resident.files.close()
            if isinstance(error, CausewayError) or not isinstance(error, Exception):
                raise
            raise UpstreamFailed(f"{name} could not be loaded ({type(error).__name__})", source="edge") from error
        resident.loaded_at, resident.idle_since = self._wall_clock(), self._clock()
        structlog.get_logger("causeway.library").info("loaded", model=name, seconds=round(self._clock() - began, 3))
        return backend

    def _checked(self, resident: _Resident) -> Need:
        """Looked over, and hashed the first time, before native code sees it; locked, so that `rm` knows. Blocks."""
        entry = resident.entry = self._shelf.entry(resident.entry.name)  # as it is now: a pull may have come between
        try:
            resident.files.enter_context(held(entry.file, shared=True))
        except OSError:
            raise UnknownModel(f"{entry.name} is not on this device any more", param="model", source="edge") from None
        facts, found = facts_of(entry.file), entry.file.stat()
        seen = (found.st_ino, found.st_size, found.st_mtime_ns)
        if seen not in self._hashed:
            verify(entry.file)
            self._hashed.add(seen)
        rules, context = self._rules, entry.context_length
        resident.slots = rules.slots or slots_for(facts, context, self._memory.total)
        return need(facts, found.st_size, slots=resident.slots, context=context, kept=rules.prefix_bytes)

    async def _started(self, resident: _Resident) -> LoadableBackend:
        backend = self._open(resident.entry.file, resident.slots)
        try:
            async with asyncio.timeout(LOAD_S):
                await backend.start()
        except BaseException as error:
            await backend.aclose()
            if isinstance(error, TimeoutError):
                raise UpstreamFailed(f"loading took more than {LOAD_S:g} s", source="edge") from None
            raise
        return backend

    async def _make_room(self, coming: _Resident) -> None:
        """Evict what is idle, least recently used first, and only if that helps. Raises NotEnoughMemory, Overloaded."""
        wanted = coming.need.total
        while wanted > self._memory.room([other.needs for other in self._residents.values() if other is not coming]):
            others = sorted((found for found in self._residents.values() if found is not coming), key=_last_used)
            idle = [other for other in others if other.idle]
            count = next((n for n in range(1, len(idle) + 1) if wanted <= self._room(others, idle[:n])), None)
            if count is None:
                raise self._refusal(coming, others, self._room(others, idle))
            for victim in idle[:count]:
                if victim.idle:
                    await self._unload(victim)

    def _room(self, others: list[_Resident], leaving: list[_Resident]) -> int:
        staying = [other.needs for other in others if other not in leaving]
        return self._memory.room(staying, [other.needs for other in leaving])

    def _refusal(self, coming: _Resident, others: list[_Resident], room: int) -> CausewayError:
        why = f"{coming.entry.name} needs {coming.need.total / 1e9:.1f} GB, {max(0, room) / 1e9:.1f} GB can be had"
        if self._room(others, others) >= coming.need.total:
            return Overloaded(f"{why} while others answer", source="edge", retry_after=BUSY_RETRY_S)
        return NotEnoughMemory(f"{why}: fewer slots or a shorter context need less", param="model", source="edge")

    async def _unload(self, resident: _Resident) -> None:
        """With `_moving` held. From here on a request for it begins a new load, which waits."""
        del self._residents[resident.entry.name]
        if (backend := resident.backend) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(UNLOAD_S):
                    await backend.aclose()
        resident.files.close()
        structlog.get_logger("causeway.library").info("unloaded", model=resident.entry.name)

    def _due(self, resident: _Resident) -> float | None:
        return None if resident.keep_s is None else resident.idle_since + resident.keep_s

    def _is_due(self, resident: _Resident) -> bool:
        due = self._due(resident)
        return resident.idle and due is not None and due <= self._clock()

    def _described(self, resident: _Resident) -> Loaded:
        backend, due = resident.backend, self._due(resident)
        left = None if due is None or not resident.idle else timedelta(seconds=due - self._clock())
        return Loaded(
            name=resident.entry.name,
            file=resident.entry.file,
            state="loaded" if backend else "loading",
            size=resident.need.total,
            file_size=resident.need.file,
            context_length=backend.model_card().context_length if backend else resident.entry.context_length,
            running=resident.users,
            processor="cpu",
            loaded_at=resident.loaded_at,
            expires_at=None if left is None else self._wall_clock() + left,
        )


@dataclass(frozen=True, slots=True)
class _Absent:
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

    _entry: Entry
    _resident: _Resident | None
    _rules: Rules

    @property
    def _backend(self) -> LoadableBackend | None:
        return self._resident.backend if self._resident else None

    def model_card(self) -> ModelCard:
        if self._resident and self._backend:
            return msgspec.structs.replace(self._backend.model_card(), digest=self._resident.entry.digest)
        return ModelCard(id=self._entry.name, context_length=self._entry.context_length, digest=self._entry.digest)

    def reading(self) -> LocalReading:
        if self._backend:
            return self._backend.reading()
        return _Absent(self._resident.users if self._resident else 0, self._rules.queue, self._rules.most_slots)

    async def count_tokens(self, request: ChatRequest) -> int:
        """Raises Overloaded if it is not loaded."""
        if self._backend is None:
            raise Overloaded(f"{self._entry.name} is not loaded", source="edge", retry_after=1)
        return await self._backend.count_tokens(request)


async def _until_ready(resident: _Resident) -> LoadableBackend:
    try:
        return await asyncio.shield(resident.ready)
    except asyncio.CancelledError:
        if resident.ready.cancelled():
            raise Overloaded("the edge agent is stopping", source="edge", retry_after=1) from None
        raise


def _failed(task: "asyncio.Task[LoadableBackend]") -> bool:
    """Looking at the exception also tells the loop that somebody has: nobody need be waiting for a load."""
    return task.cancelled() or task.exception() is not None


def _last_used(resident: _Resident) -> float:
    return resident.idle_since
