import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import EchoAnswer, ScriptedAnswer
from prometheus_client import CollectorRegistry
from serving import served
from stand_ins import FAULTS, LAST, ONE, Faulty, collect, faulty, http, opened, real, request
from waiting import HANG_S

from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.serving import load_engine
from cloud_engine.gateway.limits import TenantLimits
from cloud_engine.gateway.pool import Pool
from cloud_engine.gateway.server import Gateway
from cloud_engine.gateway.upstream import Upstream
from router.clauses import Breaker
from shared.config import InvalidSettings
from shared.errors import (
    BadRequest,
    CausewayError,
    DeadlineExceeded,
    Overloaded,
    RateLimited,
    Unreachable,
    UpstreamFailed,
)
from shared.guard import Guard
from shared.schemas import ChatRequest, Delta, Sampling

BREAKER = Breaker(consecutive_failures=2, cool_down_s=10, max_cool_down_s=40)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def pool(*inner: Any, **options: Any) -> AsyncIterator[tuple[Pool, Clock]]:
    """Our own surface over each of these answers, served for real, as the members."""
    async with AsyncExitStack() as stack:
        members = [await stack.enter_async_context(real(one)) for one in inner]
        clock = Clock()
        yield Pool(members, breaker=BREAKER, clock=clock, **options), clock


async def error_of(answer: Any, one: ChatRequest | None = None) -> CausewayError:
    with pytest.raises(CausewayError) as caught:
        await collect(answer, one or request())
    return caught.value


def counts(*members: ScriptedAnswer | EchoAnswer) -> list[int]:
    return [len(member.requests) for member in members]


class TestChoice:
    async def test_the_one_with_the_least_to_do_is_asked(self) -> None:
        """While one is busy the others get what comes; equals take turns."""
        gate = asyncio.Event()
        slow, quick = ScriptedAnswer(ONE, gate, LAST), ScriptedAnswer(ONE, LAST)
        async with pool(slow, quick) as (both, _):
            begun = asyncio.Event()
            waiting = asyncio.create_task(collect(both, request(), begun))
            await begun.wait()
            for _ in range(5):
                await collect(both, request())
            assert counts(slow, quick) == [1, 5]
            gate.set()
            await waiting
            for _ in range(4):
                await collect(both, request())
            assert counts(slow, quick) == [3, 7]
            assert both.stats().generated_tokens == 10

    async def test_a_cancel_closes_the_members_connection(self) -> None:
        """And its place is free again."""
        inner = ScriptedAnswer(ONE, asyncio.Event())
        async with pool(inner) as (alone, _):
            async with aclosing(alone.answer(request())) as deltas:
                await anext(deltas)
                assert alone.stats().running == 1
            async with asyncio.timeout(HANG_S):
                await inner.idle()
            assert alone.stats().running == alone._members[0].under_way == 0


class TestAnotherMember:
    @pytest.mark.parametrize(
        "error", [UpstreamFailed("x"), Overloaded("x", retry_after=3), RateLimited("x"), Unreachable("x")]
    )
    async def test_before_the_first_token_another_one_answers(self, error: CausewayError) -> None:
        """The client sees a whole answer and nothing else."""
        broken, well = ScriptedAnswer(error), EchoAnswer("cloud")
        async with pool(broken, well) as (both, _):
            got = await collect(both, request("a b"))
        assert "".join(delta.text for delta in got) == "a b "
        assert counts(broken, well) == [1, 1]

    async def test_after_it_the_error_is_the_clients(self) -> None:
        """Another member would begin another answer."""
        broken, well = ScriptedAnswer(ONE, UpstreamFailed("x")), EchoAnswer("cloud")
        async with pool(broken, well) as (both, _):
            assert type(await error_of(both)) is UpstreamFailed
        assert counts(broken, well) == [1, 0]

    @pytest.mark.parametrize("error", [BadRequest("x", param="top_k"), DeadlineExceeded("x")])
    async def test_what_another_one_would_not_do_better_is_not_tried(self, error: CausewayError) -> None:
        """A bad request is bad everywhere, and time that is spent is gone."""
        first, second = ScriptedAnswer(error), EchoAnswer("cloud")
        async with pool(first, second) as (both, _):
            assert type(await error_of(both)) is type(error)
        assert counts(first, second) == [1, 0]

    async def test_each_is_tried_once(self) -> None:
        """Then the last one's error is the answer."""
        members = [ScriptedAnswer(UpstreamFailed("x")) for _ in range(3)]
        async with pool(*members) as (three, _):
            assert type(await error_of(three)) is UpstreamFailed
        assert counts(*members) == [1, 1, 1]

    @pytest.mark.parametrize(("reply", "code"), FAULTS.values(), ids=FAULTS)
    async def test_of_whatever_it_answers(self, reply: bytes, code: str) -> None:
        """Alone, a faulty server is its typed error; beside a sound one it is not seen, unless the request was at fault
        or its first token was out."""
        async with faulty(reply) as (bad, _), real(EchoAnswer("cloud")) as good:
            error = await error_of(Pool([bad]))
            assert error.code == code
            begun = reply.count(b'"one"') > 0
            both = Pool([bad, good])
            if begun or code in ("bad_request", "model_not_found"):
                assert (await error_of(both)).code == code
            else:
                assert "".join(delta.text for delta in await collect(both, request("a b"))) == "a b "


class TestHealth:
    async def test_failures_eject_a_member_and_a_probe_brings_it_back(self) -> None:
        """Out after two in a row; after the cool-down exactly one request tries it; a failure doubles the wait."""
        sick, well = ScriptedAnswer(UpstreamFailed("x")), EchoAnswer("cloud")
        async with pool(sick, well, ramp_s=1e-9) as (both, clock):
            for _ in range(10):
                await collect(both, request())
            assert counts(sick, well) == [2, 10]
            clock.now += 11
            for _ in range(5):
                await collect(both, request())
            assert counts(sick, well)[0] == 3
            clock.now += 11  # of 20
            await collect(both, request())
            assert counts(sick, well)[0] == 3
            sick.script = (ONE, LAST)
            clock.now += 10
            await collect(both, request())
            clock.now += 1
            for _ in range(6):
                await collect(both, request())
            assert counts(sick, well)[0] == 3 + 1 + 3

    async def test_one_that_is_back_gets_little_at_first(self) -> None:
        """Its share grows over the ramp: with five under way elsewhere it takes one, later as many."""
        gate = asyncio.Event()
        held = ScriptedAnswer(ONE, gate, LAST), ScriptedAnswer(ONE, gate, LAST)
        async with pool(*held, ramp_s=100.0) as (both, clock):
            both._members[0].back_at = clock.now
            tasks = [asyncio.create_task(collect(both, request())) for _ in range(9)]
            await self._all_begun(both, 9)
            assert counts(*held) == [0, 9]
            clock.now += 50
            tasks += [asyncio.create_task(collect(both, request())) for _ in range(9)]
            await self._all_begun(both, 18)
            assert counts(*held) == [6, 12]
            gate.set()
            await asyncio.gather(*tasks)

    async def _all_begun(self, answer: Pool, count: int) -> None:
        async with asyncio.timeout(HANG_S):
            while answer.stats().running < count:  # noqa: ASYNC110 - statistics announce nothing
                await asyncio.sleep(0.01)

    async def test_who_asks_for_patience_is_left_alone(self) -> None:
        """For as long as it says; that is no failure, and the others go on."""
        busy, well = ScriptedAnswer(Overloaded("x", retry_after=5)), EchoAnswer("cloud")
        async with pool(busy, well) as (both, clock):
            for _ in range(4):
                await collect(both, request())
            assert counts(busy, well) == [1, 4]
            clock.now += 5.1
            busy.script = (ONE, LAST)
            await collect(both, request())
            assert counts(busy, well) == [2, 4]

    async def test_nobody_well_is_said_at_once(self) -> None:
        """Retryable, with the time after which it is worth while."""
        members = [ScriptedAnswer(UpstreamFailed("x")) for _ in range(2)]
        async with pool(*members) as (both, _):
            for _ in range(2):
                await error_of(both)
            error = await error_of(both)
        assert (type(error), error.retry_after) == (Unreachable, 10.0)
        assert counts(*members) == [2, 2]

    async def test_a_member_known_to_be_down_is_asked_last(self) -> None:
        """Its own probe said so; if it is all there is, it may be back."""
        async with (
            faulty(http(b"", "500 Internal Server Error")) as (down, stand_in),
            real(EchoAnswer("cloud")) as up,
        ):
            await down.watch()
            both = Pool([down, up])
            asked = len(stand_in.heads)
            for _ in range(5):
                await collect(both, request())
            assert len(stand_in.heads) == asked
            assert both.failure is None
            assert isinstance(Pool([down]).failure, UpstreamFailed)
            assert type(await error_of(Pool([down]))) is UpstreamFailed


MODELS = b'{"data": [{"id": "real", "max_model_len": %d}, {"id": "%s", "max_model_len": 50}, {"id": "auto"}]}'


class TestModels:
    async def test_lists_are_merged_and_requests_go_where_the_model_is(self) -> None:
        """The default anywhere; another one only to members that have it; lengths are the least that is said."""
        async with AsyncExitStack() as stack:
            stand_ins = [Faulty(http(MODELS % (size, name), kind="application/json")) for size, name in
                         ((300, b"extra"), (200, b"other"))]  # fmt: skip
            servers = [await asyncio.start_server(one, "127.0.0.1", 0) for one in stand_ins]
            ports = [server.sockets[0].getsockname()[1] for server in servers]
            members = [await stack.enter_async_context(opened(port, context_length=0)) for port in ports]
            both = Pool(members)
            await both.start()
            assert both.model_card().context_length == 200
            assert [(card.id, card.context_length) for card in both.other_cards()] == [("extra", 50), ("other", 50)]
            for one in stand_ins:
                one.reply = http(b"", "400 Bad Request")
            asked = [len(one.heads) for one in stand_ins]
            for _ in range(3):
                await error_of(both, ChatRequest(id="r", model="other", prompt="x", sampling=Sampling()))
            assert [len(one.heads) for one in stand_ins] == [asked[0], asked[1] + 3]
            for server in servers:
                server.close()

    async def test_one_that_is_away_at_the_start_may_come_later(self) -> None:
        """The pool starts with the others; with nobody there it says why."""
        async with faulty(b"", context_length=0) as (away, _), real(EchoAnswer("cloud"), context_length=0) as there:
            both = Pool([away, there])
            await both.start()
            assert both.model_card().context_length == 2048
            with pytest.raises(InvalidSettings, match="model_len"):
                await Pool([away]).start()


async def test_a_real_second_engine_and_a_faulty_one(tiny_model: Path) -> None:
    """60 requests, some cancelled, through a pool of our engine behind HTTP and of a server that fails each time."""
    engine = load_engine(tiny_model, EngineConfig(num_blocks=200, max_num_seqs=8), name="tiny")
    await engine.start()
    gateway = Gateway(engine, engine.model_card(), keys=None, limits=TenantLimits(), guard=Guard(),
                      registry=CollectorRegistry())  # fmt: skip
    rng = random.Random(0)
    failing = faulty(http(b"", "500 Internal Server Error"))
    async with served(gateway.app) as port, failing as (bad, stand_in):
        good = Upstream(f"http://127.0.0.1:{port}/v1", "cloud", context_length=256)
        both = Pool([bad, good], breaker=BREAKER)

        async def one(at: int) -> str:
            asked = ChatRequest(
                id=f"r{at}", model="auto", prompt=f"n{at}", sampling=Sampling(max_tokens=6, temperature=0)
            )
            text = ""
            async with aclosing(both.answer(asked)) as deltas:
                async for delta in deltas:
                    text += delta.text
                    if rng.random() < 0.1:
                        return "cancelled"
            assert isinstance(delta, Delta)
            assert delta.finish_reason is not None
            return text

        results = await asyncio.gather(*map(one, range(60)))
        assert 0 < results.count("cancelled") < 60
        assert len(stand_in.heads) >= 2
        async with asyncio.timeout(HANG_S):
            while engine.stats().running or engine.stats().kv_blocks_used:  # noqa: ASYNC110 - they announce nothing
                await asyncio.sleep(0.01)
        await both.aclose()
    await engine.aclose()
