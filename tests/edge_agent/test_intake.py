import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from edge_sides import HERE, ask, collect
from fakes import ScriptedAnswer, text_of
from waiting import HANG_S

from edge_agent.caller import ANYONE, Caller
from edge_agent.intake import Intake
from shared.errors import Overloaded, UpstreamFailed
from shared.schemas import Answer, ChatRequest, Delta


class Behind:
    """What an Intake lets requests in to. `callers` are those it was told of."""

    def __init__(self, inner: Answer) -> None:
        self.inner = inner
        self.callers: list[Caller] = []

    def answer(self, request: ChatRequest, caller: Caller = ANYONE) -> AsyncGenerator[Delta, None]:
        self.callers.append(caller)
        return self.inner.answer(request)


async def test_drain_waits_for_what_runs_and_takes_nothing_new() -> None:
    """A running answer is finished, a new one is refused with when to come back, and then draining is done."""
    gate = asyncio.Event()
    inner = ScriptedAnswer(HERE[0], gate, *HERE[1:])
    intake = Intake(Behind(inner))
    running = asyncio.create_task(collect(intake, ask(id="running")))
    await inner.begun.wait()

    draining = asyncio.create_task(intake.drain())
    await asyncio.sleep(0)
    refused, error = await collect(intake, ask(id="late"))
    assert not draining.done()
    gate.set()
    finished, _ = await running
    await asyncio.wait_for(draining, HANG_S)

    assert not refused
    assert isinstance(error, Overloaded)
    assert error.retry_after
    assert text_of(finished) == "from here"
    assert inner.tenants == [""]
    assert [request.id for request in inner.requests] == ["running"]


@pytest.mark.parametrize("how", ["end", "error", "left"])
async def test_nobody_is_counted_for_ever(how: str) -> None:
    """However an answer ends, it is no longer counted."""
    script = (HERE[0], UpstreamFailed("x")) if how == "error" else HERE
    intake = Intake(Behind(ScriptedAnswer(*script)))

    async with aclosing(intake.answer(ask())) as deltas:
        await anext(deltas)
        assert intake.running == 1
        if how != "left":
            with pytest.raises((UpstreamFailed, StopAsyncIteration)):
                while True:
                    await anext(deltas)

    assert intake.running == 0
    await asyncio.wait_for(intake.drain(), HANG_S)


async def test_the_choices_of_one_call_are_numbered() -> None:
    """Who asks goes with every request; of the same call, each is told apart."""
    behind = Behind(ScriptedAnswer(*HERE))
    intake = Intake(behind)

    for call in (intake.of(Caller(tenant="ann")), intake.of(Caller(tenant="bob"))):
        for _ in range(2):
            await collect(call, ask())

    assert [(caller.tenant, caller.choice) for caller in behind.callers] == [
        ("ann", 0),
        ("ann", 1),
        ("bob", 0),
        ("bob", 1),
    ]
