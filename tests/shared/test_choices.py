import asyncio
from collections import defaultdict
from contextlib import aclosing

import pytest
from fakes import EchoAnswer, ScriptedAnswer

from shared.choices import MERGE_QUEUE, merged
from shared.errors import Overloaded
from shared.schemas import ChatRequest, Delta


def requests(n: int) -> list[ChatRequest]:
    return [ChatRequest(id=f"r-{at}", model="m", prompt=f"choice {at}") for at in range(n)]


@pytest.mark.parametrize("n", [1, 2, 8])
async def test_every_choice_is_whole_and_in_order(n: int) -> None:
    """Whatever the order between choices, each one's own deltas keep theirs."""
    texts: dict[int, str] = defaultdict(str)
    async with aclosing(merged(EchoAnswer(), requests(n))) as deltas:
        async for index, delta in deltas:
            texts[index] += delta.text
    assert texts == {at: f"choice {at} " for at in range(n)}


async def test_the_first_error_ends_all() -> None:
    """It is raised after what came before it, and the other choices stop."""

    class OneFails(ScriptedAnswer):
        def answer(self, request: ChatRequest):  # type: ignore[no-untyped-def]
            end = Overloaded("x") if request.id == "r-1" else asyncio.Event()
            self.script = (Delta(text="a", tokens=1), end)
            return super().answer(request)

    answer = OneFails()
    with pytest.raises(Overloaded):
        async with aclosing(merged(answer, requests(3))) as deltas:
            async for _ in deltas:
                pass
    assert answer.running == 0


async def test_who_does_not_read_holds_the_choices_back() -> None:
    """No more than the queue is computed ahead, and closing stops every choice."""
    answer = ScriptedAnswer(*[Delta(text="a", tokens=1)] * 1000)
    stream = merged(answer, requests(2))
    await anext(stream)
    for _ in range(10 * MERGE_QUEUE):
        await asyncio.sleep(0)
    assert answer.yielded <= MERGE_QUEUE + 4
    await stream.aclose()
    assert answer.running == 0
