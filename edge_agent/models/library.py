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
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from edge_agent.backends.base import LoadableBackend, Loaded, LocalReading
from edge_agent.errors import NotEnoughMemory
from edge_agent.facts import facts_of
from edge_agent.locks import held
from edge_agent.models.memory import Memory, Need, need, slots_for
from edge_agent.models.residents import Resident, Rules, View, failed
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
        self._residents: dict[str, Resident] = {}
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
        return [self._residents[name].described(self._clock(), self._wall_clock()) for name in sorted(self._residents)]

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
        if not any(resident.is_due(self._clock()) for resident in self._residents.values()):
            return
        async with self._moving:
            for resident in [found for found in self._residents.values() if found.is_due(self._clock())]:
                if resident.is_due(self._clock()):
                    await self._unload(resident)

    async def watch(self) -> None:
        """Unload for ever what is due; ends only by being cancelled."""
        while True:
            self._changed.clear()
            due = [at for found in self._residents.values() if found.idle and (at := found.due) is not None]
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
            yield await resident.until_ready()
        finally:
            resident.users -= 1
            resident.idle_since = self._clock()
            self._changed.set()

    def _begin(self, entry: Entry) -> Resident:
        if self._closed:
            raise Overloaded("the edge agent is stopping", source="edge", retry_after=1)
        keep_s = None if entry.name == self._shelf.default.name else self._rules.keep_s
        resident = Resident(entry, self._kept.pop(entry.name, keep_s), self._clock())
        self._residents[entry.name] = resident
        resident.ready = asyncio.create_task(self._load(resident))
        resident.ready.add_done_callback(failed)
        return resident

    async def _load(self, resident: Resident) -> LoadableBackend:
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

    def _checked(self, resident: Resident) -> Need:
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

    async def _started(self, resident: Resident) -> LoadableBackend:
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

    async def _make_room(self, coming: Resident) -> None:
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

    def _room(self, others: list[Resident], leaving: list[Resident]) -> int:
        staying = [other.needs for other in others if other not in leaving]
        return self._memory.room(staying, [other.needs for other in leaving])

    def _refusal(self, coming: Resident, others: list[Resident], room: int) -> CausewayError:
        why = f"{coming.entry.name} needs {coming.need.total / 1e9:.1f} GB, {max(0, room) / 1e9:.1f} GB can be had"
        if self._room(others, others) >= coming.need.total:
            return Overloaded(f"{why} while others answer", source="edge", retry_after=BUSY_RETRY_S)
        return NotEnoughMemory(f"{why}: fewer slots or a shorter context need less", param="model", source="edge")

    async def _unload(self, resident: Resident) -> None:
        """With `_moving` held. From here on a request for it begins a new load, which waits."""
        del self._residents[resident.entry.name]
        if (backend := resident.backend) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(UNLOAD_S):
                    await backend.aclose()
        resident.files.close()
        structlog.get_logger("causeway.library").info("unloaded", model=resident.entry.name)


def _last_used(resident: Resident) -> float:
    return resident.idle_since
