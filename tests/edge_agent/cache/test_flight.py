import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

import pytest
from edge_sides import LAST, ask
from fakes import ScriptedAnswer
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.cache.flight import Flights
from shared.errors import Overloaded
from shared.schemas import Delta

A, B, C = (Delta(text=letter, tokens=1) for letter in "abc")


class Execution:
    """Flights over one script, and what they completed."""

    def __init__(self, *script: Delta | Exception | asyncio.Event | float, max_held: int = 1 << 20) -> None:
        self.answer = ScriptedAnswer(*script)
        self.flights = Flights(max_held=max_held)
        self.completed: list[tuple[Delta, ...]] = []

    async def complete(self, deltas: tuple[Delta, ...]) -> None:
        self.completed.append(deltas)

    def follow(self, name: str | None = "q") -> AsyncGenerator[Delta, None]:
        return self.flights.follow(name, lambda: self.answer.answer(ask()), self.complete)

    async def all(self, name: str | None = "q") -> list[Delta]:
        return [delta async for delta in self.follow(name)]


async def test_identical_requests_share_one_execution() -> None:
    """Ten ask at once: one runs, all get every delta, and it is completed once."""
    execution = Execution(A, 0.0, B, LAST)

    answers = await asyncio.gather(*(execution.all() for _ in range(10)))

    assert len(execution.answer.requests) == 1
    assert answers == [[A, B, LAST]] * 10
    assert execution.completed == [(A, B, LAST)]
    assert len(execution.flights) == 0


async def test_who_joins_late_gets_it_from_the_first_delta_on() -> None:
    """What was produced before he came is replayed to him."""
    gate = asyncio.Event()
    execution = Execution(A, B, gate, C, LAST)
    async with aclosing(execution.follow()) as first:
        assert [await anext(first), await anext(first)] == [A, B]
        assert execution.flights.joinable("q")
        late = asyncio.create_task(execution.all())
        await asyncio.sleep(0)
        gate.set()
        rest = [delta async for delta in first]

    assert rest == [C, LAST]
    assert await late == [A, B, C, LAST]
    assert len(execution.answer.requests) == 1


async def test_the_work_goes_on_while_anybody_follows_and_stops_with_the_last() -> None:
    """The first to ask may leave; when the last one leaves, the execution is closed by the time he is gone."""
    execution = Execution(A, asyncio.Event(), LAST)
    first, second = execution.follow(), execution.follow()
    assert await anext(first) == await anext(second) == A

    await first.aclose()
    running_after_first = execution.answer.running
    await second.aclose()

    assert running_after_first == 1
    assert execution.answer.running == 0
    assert not execution.completed
    assert len(execution.flights) == 0


@pytest.mark.parametrize("error", [Overloaded("full", retry_after=2), ValueError("a bug")])
async def test_a_failure_is_everybodys_and_the_next_request_begins_anew(error: Exception) -> None:
    """Each follower gets the error, typed ones as a copy of its own; nothing is kept of it."""
    execution = Execution(0.0, error)

    failures = await asyncio.gather(execution.all(), execution.all(), return_exceptions=True)
    again = await asyncio.gather(execution.all(), return_exceptions=True)

    assert [type(failure) for failure in (*failures, *again)] == [type(error)] * 3
    assert (failures[0] is failures[1]) == isinstance(error, ValueError)
    assert all(vars(failure) == vars(error) for failure in failures)
    assert len(execution.answer.requests) == 2
    assert not execution.completed


async def test_an_answer_without_an_end_is_not_completed() -> None:
    """It simply ends, as it would have for one alone: whoever relays it says what that means."""
    execution = Execution(A, B)

    assert await execution.all() == [A, B]
    assert not execution.completed


async def test_another_name_or_none_shares_nothing() -> None:
    """Two names and two nameless ones are four executions."""
    execution = Execution(A, 0.0, LAST)

    await asyncio.gather(*(execution.all(name) for name in ("q", "r", None, None)))

    assert len(execution.answer.requests) == 4


async def test_beyond_the_bound_nobody_joins_and_the_slowest_sets_the_pace() -> None:
    """A follower that reads nothing holds the producer up instead of filling memory, and loses no word."""
    execution = Execution(*(Delta(text="x" * 1000, tokens=1) for _ in range(100)), LAST, max_held=10_000)
    quick, slow = execution.follow(), execution.follow()
    await asyncio.gather(anext(quick), anext(slow))
    ahead = asyncio.create_task(_drained(quick))
    for _ in range(500):
        await asyncio.sleep(0)

    produced, joinable = execution.answer.yielded, execution.flights.joinable("q")
    behind = 1 + len(await _drained(slow))

    assert produced < 15
    assert not joinable
    assert len(await ahead) + 1 == behind == 101
    assert not execution.completed


async def _drained(deltas: AsyncGenerator[Delta, None]) -> list[Delta]:
    async with aclosing(deltas):
        return [delta async for delta in deltas]


STEPS = st.lists(
    st.sampled_from(["join", "read", "read", "read", "leave", "produce", "produce", "fail", "end"]), max_size=40
)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, held=st.sampled_from([300, 1000, 1 << 20]), seed=st.integers(0, 7))
def test_whatever_they_do_each_reads_a_prefix_of_one_execution(steps: list[str], held: int, seed: int) -> None:
    """Followers come, read and leave in any order while it produces, fails or ends: each has read its execution's
    deltas from the first on, in order; and with the last follower gone nothing runs."""
    asyncio.run(_any_order(steps, held, seed))


async def _any_order(steps: list[str], held: int, seed: int) -> None:
    crowd = Crowd(held)
    for at, step in enumerate(steps):
        await crowd.step(step, seed + at)
        for _ in range(6):
            await asyncio.sleep(0)
        crowd.check()
    await crowd.leave()
    assert crowd.source.running == 0
    assert len(crowd.flights) == 0


class Crowd:
    """Followers that read a delta, or leave, when told to."""

    def __init__(self, held: int) -> None:
        self.source = Source()
        self.flights = Flights(max_held=held)
        self.tasks: list[asyncio.Task[None]] = []
        self.read: list[list[Delta]] = []
        self.may: list[asyncio.Queue[None]] = []

    async def step(self, step: str, chosen: int) -> None:
        if step == "join":
            self.read.append([])
            self.may.append(asyncio.Queue())
            self.tasks.append(asyncio.create_task(self.follow(self.read[-1], self.may[-1])))
        elif step in ("produce", "fail", "end"):
            self.source.step(step)
        elif self.tasks and step == "read":
            self.may[chosen % len(self.may)].put_nowait(None)
        elif self.tasks:
            task = self.tasks[chosen % len(self.tasks)]
            task.cancel()
            await asyncio.wait({task})

    async def follow(self, read: list[Delta], may: asyncio.Queue[None]) -> None:
        with suppress(Overloaded):
            async with aclosing(self.flights.follow("q", self.source.answer, self.completed)) as deltas:
                async for delta in deltas:
                    read.append(delta)
                    await may.get()

    async def completed(self, deltas: tuple[Delta, ...]) -> None:
        assert list(deltas) in self.source.produced

    def check(self) -> None:
        for read in self.read:
            number = int(read[0].text.split(".")[0]) if read else 0
            assert read == [] or read == self.source.produced[number][: len(read)]

    async def leave(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class Source:
    """Executions that produce when told to."""

    def __init__(self) -> None:
        self.produced: list[list[Delta]] = []
        self.running = 0
        self._orders: list[asyncio.Queue[str]] = []

    def step(self, order: str) -> None:
        for orders in self._orders:
            orders.put_nowait(order)

    async def answer(self) -> AsyncGenerator[Delta, None]:
        mine: list[Delta] = []
        orders: asyncio.Queue[str] = asyncio.Queue()
        number = len(self.produced)
        self.produced.append(mine)
        self._orders.append(orders)
        self.running += 1
        try:
            while (order := await orders.get()) != "fail":
                last = order == "end"
                mine.append(Delta(text=f"{number}.{len(mine)}", finish_reason="stop" if last else None))
                yield mine[-1]
                if last:
                    return
            raise Overloaded("told to")
        finally:
            self.running -= 1
