"""The library under any order of requests, stops, crashes and time: memory is never overrun, and nobody is cut off."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from edge_sides import HERE, LAST, Local
from edge_sides import ask as request
from fakes import EchoAnswer
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model_origin import model_bytes

from edge_agent.models.library import Library
from edge_agent.models.memory import OVERHEAD_BYTES, Memory
from edge_agent.models.pull import pull
from edge_agent.models.residents import Rules
from shared.errors import CausewayError, Overloaded, UpstreamFailed
from shared.models import stored_file
from shared.schemas import ChatRequest, Delta

NAMES = ("default", "a", "b", "c")
FIT = 2
ONE = OVERHEAD_BYTES + (1 << 20)
KEEP_S = 60.0

T = TypeVar("T")


class Model(Local):
    """Answers word by word, each when it is let; `broken` ends all its answers, as a crash does."""

    def __init__(self, name: str, world: "World") -> None:
        super().__init__(EchoAnswer())
        self.name, self.world = name, world
        self.closed = self.broken = False
        self.answering = 0

    async def start(self) -> None:
        await asyncio.sleep(0)
        if self.name in self.world.unloadable:
            raise UpstreamFailed("broken")
        self.world.alive.append(self)

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        assert not self.answering or self.world.closing, f"{self.name} was unloaded while it answered"
        self.closed = True
        if self in self.world.alive:
            self.world.alive.remove(self)

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        assert not self.closed
        self.answering += 1
        try:
            yield HERE[0]
            await self.world.go[request.id].wait()
            if self.broken:
                raise UpstreamFailed("crashed")
            yield LAST
        finally:
            self.answering -= 1


class World:
    """What the machine and its models share."""

    def __init__(self) -> None:
        self.alive: list[Model] = []
        self.unloadable: set[str] = set()
        self.go: dict[str, asyncio.Event] = {}
        self.closing = False


class LibraryMachine(RuleBasedStateMachine):
    def __init__(self, store: Path) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world, self.now, self.count = World(), 0.0, 0
        self.tasks: dict[str, tuple[str, asyncio.Task[list[Delta]]]] = {}
        self.library = self.run(self.make(store))

    async def make(self, store: Path) -> Library:
        return Library(
            stored_file("default", store),
            store,
            lambda path, _: Model(path.stem, self.world),
            memory=Memory(total=100 * ONE, available=lambda: 100 * ONE, limit=FIT * ONE),
            rules=Rules(slots=2, queue=2, keep_s=KEEP_S),
            clock=lambda: self.now,
        )

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    async def settle(self) -> None:
        """Until every load has ended and every request waits for its `go` or is done."""
        for _ in range(5):
            await asyncio.sleep(0)
        for _ in range(20_000):
            if all(found.state == "loaded" for found in self.library.loaded()):
                break
            await asyncio.sleep(0.001)
        for _ in range(5):
            await asyncio.sleep(0)

    def busy(self) -> set[str]:
        return {name for name, task in self.tasks.values() if not task.done()}

    async def collect(self, name: str, id_: str) -> list[Delta]:
        return [delta async for delta in self.library.answer(request(id=id_, model=name))]

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3))
    def ask(self, names: list[str]) -> None:
        """At once: each is answered, or refused because what is busy leaves no room for it."""

        async def asked() -> None:
            for name in names:
                self.count += 1
                self.world.go[f"r{self.count}"] = asyncio.Event()
                self.tasks[f"r{self.count}"] = (name, asyncio.create_task(self.collect(name, f"r{self.count}")))
            await self.settle()

        busy = self.busy()
        self.run(asked())
        for id_, (name, task) in list(self.tasks.items()):
            if not task.done():
                continue
            error = task.exception()
            assert isinstance(error, CausewayError), (id_, error)
            if name in self.world.unloadable and name not in busy:
                assert isinstance(error, UpstreamFailed | Overloaded)
            else:
                assert isinstance(error, Overloaded), error
                assert len((busy | set(names)) - {name}) >= FIT or sum(n == name for n in names) > 1
            del self.tasks[id_]

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """An answer ends whole, whatever happened to the others."""
        id_ = data.draw(st.sampled_from(sorted(self.tasks)))
        _, task = self.tasks.pop(id_)
        self.world.go[id_].set()
        assert self.run(task_of(task))[-1] == LAST

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A client that goes away frees what it held."""
        id_ = data.draw(st.sampled_from(sorted(self.tasks)))
        _, task = self.tasks.pop(id_)
        task.cancel()
        self.run(task_of(asyncio.gather(task, return_exceptions=True)))

    @rule(name=st.sampled_from(NAMES))
    def stop(self, name: str) -> None:
        """Gone at once if nobody uses it, else marked; it never ends an answer."""
        if name not in {found.name for found in self.library.loaded()}:
            return
        assert self.run(self.library.stop(name)) is (name not in self.busy())

    @precondition(lambda self: self.world.alive)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """A runtime that breaks ends its own answers, typed; the library loads it as before."""
        model = data.draw(st.sampled_from(self.world.alive))
        model.broken = True
        hit = {id_: task for id_, (name, task) in self.tasks.items() if name == model.name}
        for id_, task in hit.items():
            self.world.go[id_].set()
            (result,) = self.run(task_of(asyncio.gather(task, return_exceptions=True)))
            assert isinstance(result, UpstreamFailed)
            del self.tasks[id_]
        model.broken = False

    @rule(name=st.sampled_from(NAMES))
    def spoil(self, name: str) -> None:
        """From now on it cannot be loaded, or can again."""
        self.world.unloadable ^= {name}

    @rule(seconds=st.sampled_from((1.0, KEEP_S)), name=st.sampled_from(NAMES), keep=st.sampled_from((0.0, None, 5.0)))
    def wait(self, seconds: float, name: str, keep: float | None) -> None:
        """Time passes; whatever is due and idle goes."""
        self.library.keep(name, keep)
        self.now += seconds
        self.run(self.library.expire())
        due = [found for found in self.library.loaded() if found.expires_at and not found.running]
        assert all(model.name in {found.name for found in self.library.loaded()} for model in self.world.alive)
        assert len(due) <= FIT

    @invariant()
    def memory_holds(self) -> None:
        """Never more loaded than fits; what the library says is loaded is; who answers has its model."""
        assert len(self.world.alive) <= FIT
        assert sorted(model.name for model in self.world.alive) == [found.name for found in self.library.loaded()]
        assert self.busy() <= {model.name for model in self.world.alive}
        users = {found.name: found.running for found in self.library.loaded()}
        assert sum(users.values()) == len(self.tasks)

    def teardown(self) -> None:
        self.world.closing = True
        self.run(self.library.aclose())
        assert self.world.alive == []
        tasks = [task for _, task in self.tasks.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            self.run(task_of(asyncio.gather(*tasks, return_exceptions=True)))
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


async def task_of(future: "asyncio.Future[T]") -> T:
    return await future


@pytest.mark.hypothesis
def test_no_order_of_events_overruns_memory_or_cuts_an_answer_off(tmp_path: Path) -> None:
    """Requests at once, ends, departures, stops, crashes, models that cannot be loaded, and time, in any order."""
    for at, name in enumerate(NAMES):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(model_bytes(100 + at))
        pull(str(path), store=tmp_path / "store", told=lambda step: None)
    limits = settings(max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(lambda: LibraryMachine(tmp_path / "store"), settings=limits)
