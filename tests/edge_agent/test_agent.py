import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from cascade_parts import routes
from edge_sides import HERE, LAST, THERE, Link, Local, Remote, Turns, ask, collect
from fakes import ScriptedAnswer, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.agent import Agent
from edge_agent.caller import Caller
from edge_agent.device import Device
from edge_agent.offload import Offload
from router.policy import Policy, parse
from router.records import Shadowed
from shared.errors import (
    BY_CODE,
    BadRequest,
    CausewayError,
    ContextTooLong,
    DeadlineExceeded,
    Overloaded,
    PolicyDenied,
    UnknownModel,
    Unreachable,
    UpstreamFailed,
    from_code,
)
from shared.schemas import ChatRequest, Delta, Route, Sampling
from shared.telemetry import RequestFinished

PREFER_CLOUD = "mode: prefer_cloud\nfirst_token_timeout_s: 5\n"


class Edge:
    """An Agent with both sides in the test's hands."""

    def __init__(
        self,
        local: tuple[Any, ...] = HERE,
        cloud: tuple[Any, ...] | None = THERE,
        *,
        policy: str = PREFER_CLOUD,
        clock: Any = None,
    ) -> None:
        self.local = Local(ScriptedAnswer(*local))
        self.remote = None if cloud is None else Remote(ScriptedAnswer(*cloud))
        self.events: list[RequestFinished] = []
        self.policy: Policy = parse(policy)
        options = {} if clock is None else {"clock": clock}
        self.offload = None if self.remote is None else Offload(self.remote, **options)
        self.agent = Agent(
            self.local,
            self.offload,
            policy=lambda _: self.policy,
            device=Device(self.local).reading,
            listeners=(self.events.append,),
        )

    def local_requests(self) -> list[ChatRequest]:
        return self.local.inner.requests  # type: ignore[attr-defined, no-any-return]

    @property
    def sent(self) -> list[ChatRequest]:
        return self.remote.seen if self.remote else []


async def test_answers_here_by_default() -> None:
    """A request that the policy keeps is answered by the device alone, and says so."""
    edge = Edge(policy="mode: prefer_edge")

    deltas, error = await collect(edge.agent, ask())

    assert error is None
    assert text_of(deltas) == "from here"
    assert routes(deltas) == [Route(target="edge", reason="mode prefer_edge", model="small")] * 2
    assert not edge.sent


async def test_offloads_and_relays_unchanged() -> None:
    """An offloaded answer is relayed delta by delta, nothing added but the route on its first and last delta."""
    edge = Edge()

    deltas, error = await collect(edge.agent, ask())

    assert error is None
    assert [delta.text for delta in deltas] == ["from ", "there", ""]
    assert deltas[-1].usage == LAST.usage
    assert [delta.route is not None for delta in deltas] == [True, False, True]
    assert routes(deltas)[0] == Route(target="cloud", reason="mode prefer_cloud", model="large")
    assert not edge.local_requests()


async def test_route_stands_on_the_one_delta_of_a_short_answer() -> None:
    """First and last delta may be the same one."""
    edge = Edge(local=(LAST,), policy="mode: only_edge")

    deltas, _ = await collect(edge.agent, ask())

    assert [delta.route.target for delta in deltas if delta.route] == ["edge"]


async def test_held_back_text_is_no_first_delta() -> None:
    """Empty deltas before the first token are not relayed, so that the first one relayed carries the route."""
    edge = Edge(local=(Delta(), Delta(), *HERE), policy="mode: only_edge")

    deltas, _ = await collect(edge.agent, ask())

    assert deltas[0].text == "from "
    assert deltas[0].route is not None


async def test_the_target_knows_its_model_best() -> None:
    """The model that a side says it ran replaces the guess; the rest of the route stays the Agent's."""
    said = Route(target="edge", reason="forged", failovers=9, model="large:v2")
    edge = Edge(cloud=(Delta(text="x", tokens=1, route=said), LAST))

    deltas, _ = await collect(edge.agent, ask())

    assert routes(deltas)[0] == Route(target="cloud", reason="mode prefer_cloud", model="large:v2")


# --- the one fallback rule ---------------------------------------------------------------------------------------

RETRYABLE = sorted(code for code, cls in BY_CODE.items() if cls.retryable)
FINAL = sorted(code for code, cls in BY_CODE.items() if not cls.retryable)


@pytest.mark.parametrize("code", RETRYABLE)
async def test_retryable_failure_before_the_first_token_falls_back(code: str) -> None:
    """The edge answers instead, and the reply says that it did, and why."""
    edge = Edge(cloud=(Delta(), from_code(code, "gone", source="cloud")))

    deltas, error = await collect(edge.agent, ask())

    assert error is None
    assert text_of(deltas) == "from here"
    assert {route.failovers for route in routes(deltas)} == {1}
    assert routes(deltas)[0].target == "edge"
    assert routes(deltas)[0].reason == f"cloud {code}: gone; answered by the edge"
    assert len(edge.sent) == 1


@pytest.mark.parametrize("code", FINAL)
async def test_other_failures_do_not_fall_back(code: str) -> None:
    """An error that trying again cannot cure is the answer."""
    edge = Edge(cloud=(from_code(code, "no"),))

    deltas, error = await collect(edge.agent, ask())

    assert not deltas
    assert error is not None
    assert (error.code, error.source) == (code, "cloud")
    assert not edge.local_requests()


@pytest.mark.parametrize("code", sorted(BY_CODE))
async def test_after_the_first_token_nothing_is_spliced(code: str) -> None:
    """What was received is a prefix of what the cloud said, and then comes its error."""
    edge = Edge(cloud=(*THERE[:1], from_code(code, "broke")))

    deltas, error = await collect(edge.agent, ask())

    assert text_of(deltas) == "from "
    assert error is not None
    assert error.code == code
    assert not edge.local_requests()


@pytest.mark.parametrize(
    ("policy", "model"),
    [
        (PREFER_CLOUD + "fallback: none", "auto"),
        ("mode: only_cloud", "auto"),
        (PREFER_CLOUD + "fallback: none", "cloud"),
        (PREFER_CLOUD, "large"),
    ],
)
async def test_no_fallback_where_it_is_not_permitted(policy: str, model: str) -> None:
    """Policy or caller insist on the cloud: its failure is the answer, with who failed."""
    edge = Edge(cloud=(Unreachable("gone"),), policy=policy)

    deltas, error = await collect(edge.agent, ask(model=model))

    assert not deltas
    assert isinstance(error, Unreachable)
    assert error.source == "cloud"
    assert not edge.local_requests()


async def test_edge_failures_never_send_a_request_away() -> None:
    """Fallback goes to the edge only: a full queue here is an error, not a reason to offload what was to stay."""
    edge = Edge(local=(Overloaded("queue full", retry_after=2),), policy="mode: prefer_edge")

    _, error = await collect(edge.agent, ask())

    assert isinstance(error, Overloaded)
    assert (error.source, error.retry_after) == ("edge", 2)
    assert not edge.sent


async def test_failing_fallback_is_the_end() -> None:
    """There is one fallback, no ping-pong: the edge's own error ends the request."""
    edge = Edge(local=(Overloaded("queue full"),), cloud=(Unreachable("gone"),))

    _, error = await collect(edge.agent, ask())

    assert isinstance(error, Overloaded)
    assert error.source == "edge"
    assert len(edge.sent) == len(edge.local_requests()) == 1


async def test_silent_cloud_is_given_up_after_the_policys_time() -> None:
    """No first token within first_token_timeout_s: the cloud's work is cancelled and the edge answers."""
    edge = Edge(cloud=(asyncio.Event(), *THERE), policy="mode: prefer_cloud\nfirst_token_timeout_s: 0.01")

    deltas, error = await collect(edge.agent, ask())

    assert error is None
    assert text_of(deltas) == "from here"
    assert routes(deltas)[0].reason.startswith(f"cloud {DeadlineExceeded.code}: ")
    assert edge.remote is not None
    assert edge.remote.inner.running == 0  # type: ignore[attr-defined]


async def test_slow_tokens_after_the_first_are_no_timeout() -> None:
    """The time limit is on the first token alone."""
    edge = Edge(cloud=(THERE[0], 0.05, *THERE[1:]), policy="mode: prefer_cloud\nfirst_token_timeout_s: 0.02")

    deltas, error = await collect(edge.agent, ask())

    assert error is None
    assert text_of(deltas) == "from there"


@pytest.mark.parametrize("begun", [False, True])
async def test_stream_without_an_end_is_an_error(begun: bool) -> None:
    """A side that stops without its last delta has failed; before its first token that is made good."""
    edge = Edge(cloud=THERE[: 1 if begun else 0])

    deltas, error = await collect(edge.agent, ask())

    assert isinstance(error, UpstreamFailed) is begun
    assert text_of(deltas) == ("from " if begun else "from here")


async def test_nothing_follows_the_last_delta() -> None:
    """Whatever a side says after its end is not relayed."""
    edge = Edge(local=(*HERE, Delta(text="more", tokens=1), UpstreamFailed("late")), policy="mode: only_edge")

    deltas, error = await collect(edge.agent, ask())

    assert error is None
    assert text_of(deltas) == "from here"


async def test_reason_of_a_fallback_is_short_and_printable() -> None:
    """Whatever text a peer puts into its error, the reason fits a header."""
    edge = Edge(cloud=(Unreachable("a\u20ac" + "b" * 2000),))

    deltas, _ = await collect(edge.agent, ask())

    reason = routes(deltas)[0].reason
    assert reason.isascii()
    assert len(reason) < 200
    assert reason.endswith("; answered by the edge")


# --- promises ------------------------------------------------------------------------------------------------------

STEP = st.one_of(
    st.sampled_from([Delta(), Delta(text="a", tokens=1), Delta(text="b", tokens=1), LAST]),
    st.sampled_from(sorted(BY_CODE)).map(lambda code: from_code(code, "scripted")),
    st.sampled_from([ValueError("a bug"), TimeoutError("a bug")]),
)
SCRIPT = st.lists(STEP, max_size=6).map(tuple)
MODES = ("prefer_edge", "prefer_cloud", "only_edge", "only_cloud")


async def outcome(edge: Edge, request: ChatRequest) -> tuple[list[Delta], BaseException | None]:
    deltas: list[Delta] = []
    try:
        async for delta in edge.agent.answer(request):
            deltas.append(delta)  # noqa: PERF401  what came before an error counts
    except (CausewayError, ValueError, TimeoutError) as error:
        return deltas, error
    return deltas, None


def upto_last(script: tuple[Any, ...]) -> tuple[Any, ...]:
    return script[: script.index(LAST) + 1] if LAST in script else script


@settings(max_examples=150, deadline=None)
@given(here=SCRIPT, there=SCRIPT, mode=st.sampled_from(MODES), model=st.sampled_from(["auto", "edge", "cloud"]))
def test_every_request_ends_once_with_a_prefix_of_one_side(here: Any, there: Any, mode: str, model: str) -> None:
    """Promises 1 and 2: one terminal state, one event, and never a word of two models in one answer."""
    edge, scripts = Edge(here, there, policy=f"mode: {mode}"), {"edge": here, "cloud": there}

    deltas, error = asyncio.run(outcome(edge, ask(model=model)))

    said = text_of(deltas)
    finished = [delta for delta in deltas if delta.finish_reason is not None]
    assert (error is None) == bool(finished)
    assert len(finished) <= 1
    assert len(edge.events) == 1
    assert (edge.events[0].outcome == "done") == bool(finished)
    if deltas:
        target = routes(deltas)[0].target
        produced = text_of([step for step in upto_last(scripts[target]) if isinstance(step, Delta)])
        assert produced == said if finished else produced.startswith(said)
        assert {route.target for route in routes(deltas)} == {target}
        assert deltas[0].route is not None
    assert len(edge.sent) <= 1
    assert len(edge.local_requests()) <= 1


@settings(max_examples=100, deadline=None)
@given(
    here=SCRIPT,
    there=SCRIPT,
    mode=st.sampled_from(MODES),
    model=st.sampled_from(["auto", "edge", "cloud", "small", "large", "none"]),
    tokens=st.sampled_from([1, 5000, 100_000]),
    available=st.booleans(),
)
def test_edge_only_puts_nothing_on_the_wire(
    here: Any, there: Any, mode: str, model: str, tokens: int, available: bool
) -> None:
    """Promise 3: whatever fails, however long the prompt, whoever is asked for: the cloud's backend is not called."""
    edge = Edge(here, there, policy=f"mode: {mode}")
    edge.local.tokens = tokens
    edge.local.runtime.available = available

    asyncio.run(outcome(edge, ask(model=model, label="edge_only")))

    assert not edge.sent


@pytest.mark.parametrize("policy", ["mode: only_edge", "mode: only_cloud"])
async def test_leaving_ends_the_work_behind(policy: str) -> None:
    """Closing the stream closes the side that answers, and the event says cancelled."""
    edge = Edge((HERE[0], asyncio.Event()), (THERE[0], asyncio.Event()), policy=policy)
    behind = edge.local.inner if "edge" in policy else edge.remote.inner  # type: ignore[union-attr]

    async with aclosing(edge.agent.answer(ask())) as deltas:
        await anext(deltas)
        assert behind.running == 1  # type: ignore[attr-defined]

    assert behind.running == 0  # type: ignore[attr-defined]
    assert [event.outcome for event in edge.events] == ["cancelled"]


async def test_a_bug_in_one_side_is_reported_and_harms_nobody_else() -> None:
    """An untyped exception ends its request, and the next one is served."""
    edge = Edge(policy="mode: only_edge")
    edge.local.inner = Turns((ValueError("a bug"),), HERE)

    with pytest.raises(ValueError, match="a bug"):
        [delta async for delta in edge.agent.answer(ask())]
    deltas, error = await collect(edge.agent, ask())

    assert error is None
    assert text_of(deltas) == "from here"
    assert [event.outcome for event in edge.events] == ["error", "done"]


# --- what is measured, and what is refused ---------------------------------------------------------------------------


async def test_long_prompts_are_refused_by_name_or_routed() -> None:
    """What the device cannot take goes to the cloud; what neither takes is an error that says so."""
    edge = Edge(policy="mode: prefer_edge")

    edge.local.tokens = 5000
    routed, _ = await collect(edge.agent, ask())
    edge.local.tokens = 50_000
    _, error = await collect(edge.agent, ask())

    assert routes(routed)[0].target == "cloud"
    assert isinstance(error, ContextTooLong)
    assert error.param is not None


@pytest.mark.parametrize("broken", [BadRequest("no template"), TimeoutError()])
async def test_without_a_tokenizer_the_prompt_is_estimated(broken: Exception) -> None:
    """A tokenizer that fails, or a model that is not there, does not keep a request from the cloud."""
    edge = Edge()
    edge.local.tokens = broken

    deltas, _ = await collect(edge.agent, ask())
    edge.local.runtime.available = False
    without, _ = await collect(edge.agent, ask())

    assert text_of(deltas) == text_of(without) == "from there"
    assert edge.local.counted == 1


async def test_unknown_models_are_named_with_the_known_ones() -> None:
    """The error lists what there is; no side is asked."""
    edge = Edge()

    _, error = await collect(edge.agent, ask(model="gpt-17"))

    assert isinstance(error, UnknownModel)
    assert all(name in error.message for name in ("auto", "edge", "cloud", "small", "large"))
    assert not edge.sent


@pytest.mark.parametrize(
    ("model", "target"), [("small", "edge"), ("edge", "edge"), ("large", "cloud"), ("cloud", "cloud")]
)
async def test_a_model_can_be_asked_for_by_name(model: str, target: str) -> None:
    """Virtual and real names reach the side they mean."""
    edge = Edge(policy="mode: prefer_edge")

    deltas, _ = await collect(edge.agent, ask(model=model))

    assert routes(deltas)[0].target == target


async def test_works_with_no_cloud_at_all() -> None:
    """Without a cloud everything is answered here, and the cloud by name is refused by name."""
    edge = Edge(cloud=None)

    deltas, _ = await collect(edge.agent, ask())
    _, error = await collect(edge.agent, ask(model="cloud"))

    assert text_of(deltas) == "from here"
    assert isinstance(error, PolicyDenied)


async def test_works_with_the_cloud_down_from_the_start() -> None:
    """Never connected: answered here at once, with the reason."""
    edge = Edge()
    assert edge.remote is not None
    edge.remote.state = Link(connected=False, model=None, context_length=None)

    deltas, _ = await collect(edge.agent, ask())

    assert text_of(deltas) == "from here"
    assert "cloud is not connected" in routes(deltas)[0].reason
    assert not edge.sent


async def test_a_request_keeps_the_policy_it_was_decided_by() -> None:
    """A reload while the cloud works changes nothing for the request under way."""
    gate = asyncio.Event()
    edge = Edge(cloud=(THERE[0], gate, *THERE[1:]))

    async with aclosing(edge.agent.answer(ask())) as deltas:
        first = await anext(deltas)
        edge.policy = parse("mode: only_edge")
        gate.set()
        rest = [delta async for delta in deltas]

    assert text_of([first, *rest]) == "from there"
    assert (await collect(edge.agent, ask()))[0][0].route.target == "edge"  # type: ignore[union-attr]


async def test_a_tenants_requests_follow_its_own_part_of_the_policy() -> None:
    """The plan names the whole policy's version, and what the shadow would have done is recorded, not done."""
    edge = Edge(policy=PREFER_CLOUD + "tenants: {lab: {mode: only_edge}}\nshadow: {mode: prefer_edge}")

    lab, other = await edge.agent.plan(ask(), Caller("lab")), await edge.agent.plan(ask())

    assert (lab.record.target, other.record.target) == ("edge", "cloud")
    assert (lab.record.request.tenant, other.record.request.tenant) == ("lab", "")
    assert lab.record.policy == other.record.policy == edge.policy.fingerprint
    assert other.record.shadow == Shadowed(target="edge", rule="mode")
    deltas, _ = await collect(edge.agent, ask())
    assert deltas[-1].route is not None
    assert deltas[-1].route.target == "cloud"


async def test_a_shadow_that_refuses_hurts_nobody() -> None:
    """Its refusal is what is recorded."""
    edge = Edge(policy="mode: prefer_edge\nshadow: {mode: only_cloud, fallback: none}", cloud=None)

    plan = await edge.agent.plan(ask())

    assert plan.record.target == "edge"
    assert plan.record.shadow == Shadowed(refused="policy_denied")


async def test_what_cannot_be_redacted_is_answered_here() -> None:
    """A stop string that placeholders make too long: nothing is sent, and the device stands in, visibly."""
    edge = Edge()
    stop = "a@b.cc " * 30
    request = ChatRequest(
        id="r1", model="auto", messages=ask("hello").messages, sampling=Sampling(stop=(stop,)), label="redact"
    )

    deltas, error = await collect(edge.agent, request)

    assert error is None
    assert text_of(deltas) == "from here"
    assert edge.remote is not None
    assert not edge.remote.seen
    assert deltas[0].route is not None
    assert deltas[0].route.reason.startswith("cloud policy_denied: it could not be redacted")


async def test_the_label_that_was_found_travels_with_the_request() -> None:
    """What the detector says must stay reaches the local model as edge_only: so its prompt is not kept on disk."""
    edge = Edge(policy=PREFER_CLOUD + "privacy: {secrets: edge_only}")

    deltas, _ = await collect(edge.agent, ask("AKIA" + "ABCDEFGH" * 2))

    assert text_of(deltas) == "from here"
    assert [request.label for request in edge.local.inner.requests] == ["edge_only"]  # type: ignore[attr-defined]
