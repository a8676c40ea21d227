"""The cache behind a real Agent; both sides scripted."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from cache_parts import Clock, greedy
from edge_sides import HERE, LAST, THERE, Link, Local, Remote, ask, collect
from fakes import EchoAnswer, ScriptedAnswer, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.agent import Agent
from edge_agent.cache.answers import PIECE_CHARS, AnswerCache
from edge_agent.cache.control import Control
from edge_agent.cache.memory import MemoryLayer
from edge_agent.cache.store import Store
from edge_agent.caller import ANYONE, Caller
from edge_agent.device import Device
from edge_agent.intake import Intake
from edge_agent.offload import Offload
from router.policy import parse
from shared.errors import DeadlineExceeded, NotCached, PolicyDenied, Unreachable, UpstreamFailed
from shared.schemas import CacheUse, ChatRequest, Delta, Route, Sampling, TokenLogprob, ToolPiece
from shared.telemetry import RequestFinished


class Edge:
    """An Agent with a cache in memory; requests by `caller`."""

    def __init__(
        self,
        local: tuple[Any, ...] = HERE,
        cloud: tuple[Any, ...] | None = None,
        *,
        policy: str = "mode: prefer_edge",
        memory: MemoryLayer | None = None,
        runtime: str = "",
    ) -> None:
        self.local = Local(ScriptedAnswer(*local))
        self.remote = None if cloud is None else Remote(ScriptedAnswer(*cloud))
        self.policy = parse(policy)
        self.clock = Clock()
        self.memory = memory or MemoryLayer(1 << 20)
        self.cache = AnswerCache(Store([self.memory], clock=self.clock), runtime=runtime, clock=self.clock)
        self.events: list[RequestFinished] = []
        self.agent = Agent(
            self.local,
            None if self.remote is None else Offload(self.remote),
            policy=lambda _: self.policy,
            device=Device(self.local).reading,
            cache=self.cache,
            listeners=(self.events.append,),
        )

    @property
    def runs(self) -> int:
        """How often a model on this device was asked."""
        return len(self.local.inner.requests)  # type: ignore[attr-defined, no-any-return]

    def by(self, caller: Caller = ANYONE, **control: Any) -> Any:
        return Intake(self.agent).of(replace(caller, cache=Control(**control)))

    async def uses(self, *requests: ChatRequest, caller: Caller = ANYONE, **control: Any) -> list[CacheUse]:
        """Ask one after the other; what the cache had to do with each."""
        return [use_of((await collect(self.by(caller, **control), request))[0]) for request in requests]


def use_of(deltas: list[Delta]) -> CacheUse:
    routes = [delta.route for delta in deltas if delta.route]
    assert deltas[0].route is routes[0]
    assert deltas[-1].route is routes[-1]
    assert routes[0].cached is not None
    assert routes[0] == routes[-1]
    return routes[0].cached.use


async def test_the_second_time_it_comes_from_the_cache() -> None:
    """The same words, in a stream, with who answered, from where and how old; the model worked once."""
    edge = Edge()

    first, _ = await collect(edge.by(), greedy())
    edge.clock.now += 12
    second, error = await collect(edge.by(), greedy(id="r2"))

    assert error is None
    assert text_of(first) == text_of(second) == "from here"
    assert (use_of(first), use_of(second), edge.runs) == ("miss", "hit", 1)
    route = second[0].route
    assert route is not None
    assert (route.target, route.model) == ("edge", "small")
    assert route.reason == "no cloud is in use; cache hit: memory, 12 s old"
    assert route.cached is not None
    assert (route.cached.layer, route.cached.age_s) == ("memory", 12)
    usage = second[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 2, 3)


SEEDED, DRAWN = Sampling(temperature=0.7, seed=1), Sampling(temperature=0.7)


@pytest.mark.parametrize(
    ("sampling", "policy", "control", "second"),
    [
        (Sampling(temperature=0), "", {}, "hit"),
        (SEEDED, "", {}, "hit"),
        (DRAWN, "", {}, "bypass"),
        (DRAWN, "", {"max_age_s": 60.0}, "hit"),
        (DRAWN, "sampled: true", {}, "hit"),
        (SEEDED, "enabled: false", {}, "bypass"),
        (SEEDED, "", {"no_store": True}, "bypass"),
        (SEEDED, "", {"no_cache": True}, "miss"),
    ],
)
async def test_what_is_kept(sampling: Sampling, policy: str, control: dict[str, Any], second: CacheUse) -> None:
    """Answers that chance has no part in; others where the caller or the policy says so."""
    edge = Edge(policy=f"mode: prefer_edge\ncache: {{{policy}}}")
    request = msgspec.structs.replace(ask(), sampling=sampling)

    uses = await edge.uses(request, request, **control)

    assert uses == ["bypass" if second == "bypass" else "miss", second]
    assert edge.runs == (1 if second == "hit" else 2)
    assert edge.memory.stats().entries == (0 if second == "bypass" else 1)


async def test_the_caller_says_how_old_and_whether() -> None:
    """no-cache makes it anew and keeps that; max-age takes nothing older; no-store leaves what is kept alone."""
    edge = Edge()
    await edge.uses(greedy())
    edge.clock.now += 100

    assert await edge.uses(greedy(), no_store=True) == ["bypass"]
    assert await edge.uses(greedy(), max_age_s=99.0) == ["miss"]
    assert await edge.uses(greedy(), max_age_s=99.0) == ["hit"]
    edge.clock.now += 100
    assert await edge.uses(greedy(), no_cache=True) == ["miss"]
    assert await edge.uses(greedy(), max_age_s=1.0) == ["hit"]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), DRAWN])
async def test_only_if_cached_asks_no_model(sampling: Sampling) -> None:
    """What is not there is a typed error, which nobody else is asked for."""
    edge = Edge(cloud=THERE, policy="mode: prefer_cloud")
    request = msgspec.structs.replace(ask(), sampling=sampling)

    deltas, error = await collect(edge.by(only_if_cached=True), request)

    assert not deltas
    assert isinstance(error, NotCached)
    assert (error.status, error.retryable, error.param) == (504, False, "cache-control")
    assert edge.remote is not None
    assert edge.runs == len(edge.remote.seen) == 0


async def test_only_if_cached_serves_what_is_there() -> None:
    """As a hit."""
    edge = Edge()
    await edge.uses(greedy())

    assert await edge.uses(greedy(), only_if_cached=True) == ["hit"]


# --- never a wrong answer -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from(["ann", "bob"]),
            st.sampled_from(["free", "edge_only"]),
            st.sampled_from(["x y", "z"]),
            st.sampled_from([1, 2]),
        ),
        max_size=12,
    )
)
def test_a_hit_says_what_its_own_model_would(asked: list[tuple[str, str, str, int]]) -> None:
    """S-47: an answer is always that of its question, and only the same tenant and label share it."""
    edge = Edge()
    edge.local.inner = EchoAnswer()
    seen: set[Any] = set()

    async def run() -> None:
        for tenant, label, text, limit in asked:
            request = msgspec.structs.replace(
                ask(text, label=label), sampling=Sampling(temperature=0, max_tokens=limit)
            )
            deltas, _ = await collect(edge.by(Caller(tenant=tenant)), request)
            assert text_of(deltas).split() == text.split()[:limit]
            assert use_of(deltas) == ("hit" if (tenant, label, text, limit) in seen else "miss")
            seen.add((tenant, label, text, limit))

    asyncio.run(run())


async def test_another_model_here_answers_anew() -> None:
    """The same name with other bytes, or another context, is another model."""
    edge = Edge()
    await edge.uses(greedy())

    edge.local.card = msgspec.structs.replace(edge.local.card, digest="other")
    assert await edge.uses(greedy()) == ["miss"]
    edge.local.card = msgspec.structs.replace(edge.local.card, context_length=1024)
    assert await edge.uses(greedy()) == ["miss"]


async def test_other_settings_of_the_runtime_answer_anew() -> None:
    """What was kept before a setting changed that changes answers is not served after; the cloud's answers are."""
    first = Edge(cloud=THERE)
    cloud = msgspec.structs.replace(greedy(), model="cloud")
    assert await first.uses(greedy(), cloud) == ["miss", "miss"]

    assert await Edge(cloud=THERE, memory=first.memory).uses(greedy(), cloud) == ["hit", "hit"]
    shifts = Edge(cloud=THERE, memory=first.memory, runtime="context_shift")
    assert await shifts.uses(greedy(), cloud) == ["miss", "hit"]


async def test_what_the_cloud_said_is_not_said_by_the_edge() -> None:
    """The cache never changes who answers: decided for the edge, it is the edge's answer or none."""
    edge = Edge(cloud=THERE, policy="mode: prefer_cloud")
    await edge.uses(greedy())
    assert edge.remote is not None
    edge.remote.state = Link(connected=False)

    here, _ = await collect(edge.by(), greedy())
    edge.remote.state = Link()
    there, _ = await collect(edge.by(), greedy())

    assert (text_of(here), use_of(here)) == ("from here", "miss")
    assert (text_of(there), use_of(there)) == ("from there", "hit")
    assert len(edge.remote.seen) == 1


async def test_a_hit_of_the_clouds_answer_sends_nothing() -> None:
    """The second time, not one request leaves the device."""
    edge = Edge(cloud=THERE, policy="mode: prefer_cloud")

    assert await edge.uses(greedy(), greedy()) == ["miss", "hit"]
    assert edge.remote is not None
    assert len(edge.remote.seen) == 1


@pytest.mark.parametrize(
    "script",
    [
        (HERE[0],),
        (HERE[0], UpstreamFailed("broke")),
        (HERE[0], Delta(finish_reason="cancelled", usage=LAST.usage)),
        (Delta(), DeadlineExceeded("late")),
    ],
)
async def test_what_is_not_whole_is_not_kept(script: tuple[Any, ...]) -> None:
    """Neither a stream without an end, nor one that failed or was cancelled."""
    edge = Edge(local=script)

    await collect(edge.by(), greedy())
    await collect(edge.by(), greedy())

    assert edge.runs == 2
    assert edge.memory.stats().entries == 0


async def test_an_answer_that_nobody_stayed_for_is_not_kept() -> None:
    """The only reader leaves in the middle: the work ends, and nothing of it is served to the next."""
    edge = Edge(local=(HERE[0], asyncio.Event(), *HERE[1:]))

    async with aclosing(edge.by().answer(greedy())) as deltas:
        await anext(deltas)

    assert edge.local.inner.running == 0  # type: ignore[attr-defined]
    assert edge.memory.stats().entries == 0
    assert [event.outcome for event in edge.events] == ["cancelled"]


async def test_edge_only_is_kept_apart_or_not_at_all() -> None:
    """Its answers serve edge_only requests alone; the policy can keep none of them."""
    edge = Edge()
    private = greedy(label="edge_only")

    assert await edge.uses(private, greedy(), private) == ["miss", "miss", "hit"]
    edge.policy = parse("mode: prefer_edge\ncache: {edge_only: false}")
    assert await edge.uses(private, greedy()) == ["bypass", "hit"]


async def test_what_must_stay_here_is_kept_as_if_it_were_labelled_so() -> None:
    """A free request in which the policy finds what must not leave is handled as edge_only by the cache too."""
    edge = Edge(policy="mode: prefer_edge\nprivacy: {personal: edge_only}\ncache: {edge_only: false}")

    assert await edge.uses(greedy("Write to ann@example.com"), greedy("Write to her")) == ["bypass", "miss"]


async def test_a_policy_that_refuses_refuses_what_is_kept_too() -> None:
    """The decision comes first: nothing is looked up for a request that nobody may answer."""
    edge = Edge(cloud=THERE, policy="mode: prefer_cloud")
    await edge.uses(greedy())
    edge.policy = parse("mode: only_edge")

    _, error = await collect(edge.by(), msgspec.structs.replace(greedy(), model="cloud"))

    assert isinstance(error, PolicyDenied)


# --- falling back, sharing, streaming -------------------------------------------------------------------------------


async def test_a_fallback_is_the_edges_answer() -> None:
    """The edge's answer in the cloud's place is kept as the edge's; the cloud is asked again the next time."""
    edge = Edge(cloud=(Unreachable("gone"),), policy="mode: prefer_cloud")

    first, _ = await collect(edge.by(), greedy())
    second, _ = await collect(edge.by(), greedy())

    assert text_of(first) == text_of(second) == "from here"
    assert (use_of(first), use_of(second)) == ("miss", "hit")
    assert edge.remote is not None
    assert (len(edge.remote.seen), edge.runs) == (2, 1)
    assert second[0].route is not None
    assert second[0].route.failovers == 1


async def test_followers_of_a_failed_execution_each_fall_back() -> None:
    """Five ask the cloud at once, which fails before its first token: all are answered here, by one execution each."""
    edge = Edge(cloud=(0.0, Unreachable("gone")), local=(0.0, *HERE), policy="mode: prefer_cloud")

    answers = await asyncio.gather(*(collect(edge.by(), greedy(id=f"r{at}")) for at in range(5)))

    assert [text_of(deltas) for deltas, _ in answers] == ["from here"] * 5
    assert edge.remote is not None
    assert (len(edge.remote.seen), edge.runs) == (1, 1)
    assert [event.outcome for event in edge.events] == ["done"] * 5


async def test_identical_requests_in_flight_share_one_execution() -> None:
    """The first is a miss, the others shared it; a tenant, a label or a word of difference shares nothing."""
    edge = Edge(local=(0.0, HERE[0], 0.0, *HERE[1:]))
    alike = [collect(edge.by(), greedy(id=f"r{at}")) for at in range(4)]
    others = [
        collect(edge.by(Caller(tenant="ann")), greedy()),
        collect(edge.by(), greedy(label="edge_only")),
        collect(edge.by(), greedy("Hello!")),
        collect(edge.by(), msgspec.structs.replace(greedy(), deadline_s=30.0)),
        collect(edge.by(no_cache=True), greedy()),
        collect(edge.by(), msgspec.structs.replace(greedy(), priority="batch")),
    ]

    answers = await asyncio.gather(*alike, *others)

    assert {text_of(deltas) for deltas, _ in answers} == {"from here"}
    assert [use_of(deltas) for deltas, _ in answers] == ["miss", *["shared"] * 3, *["miss"] * 6]
    assert edge.runs == 1 + len(others)


async def test_drawn_choices_of_one_call_stay_different() -> None:
    """Two choices of a sampled request that may be kept are two executions, and two answers the next time."""
    edge = Edge(local=(0.0, *HERE), policy="mode: prefer_edge\ncache: {sampled: true}")
    request = msgspec.structs.replace(ask(), sampling=DRAWN)

    for use in ("miss", "hit"):
        call = edge.by()
        answers = await asyncio.gather(collect(call, request), collect(call, request))
        assert [use_of(deltas) for deltas, _ in answers] == [use] * 2

    assert edge.runs == edge.memory.stats().entries == 2


async def test_a_hit_streams_in_pieces_and_loses_nothing() -> None:
    """Text, tokens and log probabilities are those of the original; a long answer comes in more than one piece."""
    words = tuple(
        Delta(text=f"word {at} ", tokens=1, logprobs=(TokenLogprob(f"word {at} ", -0.1 * at),)) for at in range(200)
    )
    edge = Edge(local=(*words, LAST))

    first, _ = await collect(edge.by(), greedy())
    second, _ = await collect(edge.by(), greedy())

    assert text_of(second) == text_of(first)
    assert sum(delta.tokens for delta in second) == 200
    assert [one for delta in second for one in delta.logprobs] == [one for delta in first for one in delta.logprobs]
    assert 3 < len(second) < 20
    assert max(len(delta.text) for delta in second) < 2 * PIECE_CHARS


async def test_calls_of_tools_have_ids_of_the_request_that_gets_them() -> None:
    """Names and arguments are those that were kept; no id is in two conversations, and the same request's is stable."""
    call = Delta(tool_calls=(ToolPiece(0, id="call_1", name="look"), ToolPiece(0, arguments="{}")), tokens=2)
    edge = Edge(local=(call, Delta(finish_reason="tool_calls", usage=LAST.usage)))
    await collect(edge.by(), greedy())

    async def pieces(request_id: str) -> tuple[ToolPiece, ...]:
        deltas, _ = await collect(edge.by(), greedy(id=request_id))
        assert use_of(deltas) == "hit"
        return deltas[0].tool_calls

    one, other, again = [await pieces(name) for name in ("a", "b", "a")]
    assert [(piece.name, piece.arguments) for piece in one] == [("look", ""), (None, "{}")]
    assert one == again
    assert len({"call_1", one[0].id, other[0].id}) == 3


async def test_the_model_that_answered_is_named_on_a_hit_too() -> None:
    """What the side said it ran is kept with the answer."""
    said = msgspec.structs.replace(THERE[0], route=Route(target="cloud", reason="", model="v2"))
    edge = Edge(cloud=(said, *THERE[1:]), policy="mode: prefer_cloud")
    await collect(edge.by(), greedy())

    deltas, _ = await collect(edge.by(), greedy())

    assert [delta.route.model for delta in deltas if delta.route] == ["v2", "v2"]


async def test_it_counts_what_it_did() -> None:
    """Of all requests, and layer by layer."""
    edge = Edge()
    await edge.uses(greedy(), greedy(), ask())

    stats = edge.cache.stats()

    assert stats["requests"] == {"hit": 1, "shared": 0, "miss": 1, "bypass": 1}
    assert (stats["layers"]["memory"]["hits"], stats["layers"]["memory"]["misses"]) == (1, 1)
    assert stats["in_flight"] == 0
    assert [event.tenant for event in edge.events] == ["local"] * 3
