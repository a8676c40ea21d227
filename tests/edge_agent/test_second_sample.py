"""The second sample: drawn beside the first answer, never shown, and how far the two agree counts."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from cascade_parts import HERE, POLICY, Edge, answer, routes
from edge_sides import LAST, Local, ask, collect
from fakes import ScriptedAnswer, text_of

from edge_agent.backends.llama import LlamaBackend
from edge_agent.second_sample import Compared, Second
from router.cascade_rules import CascadeRules, SecondSample
from router.confidence import Tally
from router.policy import parse
from shared.errors import UpstreamFailed
from shared.schemas import ChatRequest, Delta, Message, Sampling, TokenLogprob

AGREEING = POLICY.replace("threshold: 0.6", "threshold: 0.6, second_sample: {temperature: 0.9}")


def script(*texts: str) -> tuple[Delta, ...]:
    return (*(Delta(text=text, tokens=1, logprobs=(TokenLogprob(text, -0.1),)) for text in texts), LAST)


class Samples:
    """A local model: the first answer by one script, the second sample by the other."""

    def __init__(self, first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
        self.first, self.second = ScriptedAnswer(*first), ScriptedAnswer(*second)

    def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        return (self.second if request.id.endswith(".second") else self.first).answer(request)


SETTLED = msgspec.structs.replace(ask(), sampling=Sampling(temperature=0), streamed=True)
SAME, OTHER = script("It ", "is ", "here. ", "Yes"), script("Nothing ", "whatever, ", "alas. ", "No")


@pytest.mark.parametrize(
    ("p", "second", "said"),
    [
        (0.5, SAME, "p 0.75 >= 0.60"),
        (0.9, OTHER, "p 0.45 < 0.60"),
        (0.9, (UpstreamFailed("gone"),), "p 0.90 >= 0.60"),
        (0.9, (SAME[0],), "p 0.90 >= 0.60"),
    ],
)
async def test_agreement_counts(p: float, second: tuple[Any, ...], said: str) -> None:
    """Half of an uncalibrated p is how far the two begin alike; a second sample that fails, or has no end, is none."""
    samples = Samples(answer(p), second)
    edge = Edge(samples, policy=AGREEING)

    deltas, error = await collect(edge.agent, ask())

    assert error is None
    assert len(samples.second.requests) == 1
    assert said in routes(deltas)[0].reason
    assert text_of(deltas) == (HERE if ">=" in said else "from there")
    assert samples.first.running == samples.second.running == 0
    (kept,) = edge.kept
    assert kept.judged is not None
    assert (kept.judged.heard.agreement is None) == (len(second) == 1)


async def test_it_is_heard_as_far_as_the_first() -> None:
    """It is stopped at the end of its own first sentence, and stays on the device."""
    samples = Samples(answer(0.9), SAME)
    edge = Edge(samples, policy=AGREEING)

    await collect(edge.agent, ask())

    assert samples.second.yielded == 3
    assert not edge.remote.seen


async def test_it_is_drawn_apart() -> None:
    """By the policy's temperature, a seed of its own, few tokens; with the client's other wishes and label."""
    samples = Samples(answer(0.9), SAME)
    edge = Edge(samples, policy=AGREEING)
    sampling = Sampling(temperature=0, seed=7, max_tokens=1000, min_tokens=500, top_p=0.5, logprobs=3)

    await collect(edge.agent, msgspec.structs.replace(ask(label="redact"), sampling=sampling))

    (first,), (second,) = samples.first.requests, samples.second.requests
    assert (first.sampling.temperature, first.sampling.seed) == (0, 7)
    assert second.sampling == Sampling(temperature=0.9, seed=6, max_tokens=256, top_p=0.5, logprobs=0)
    assert (second.label, second.messages) == ("redact", first.messages)


async def test_it_takes_no_slot_that_somebody_waits_for() -> None:
    """No free slot, somebody in the queue, or a model that is not here: the first is judged alone."""
    busy: list[dict[str, Any]] = [{"running": 4}, {"queue_depth": 1}, {"available": False}, {}]
    for state in busy:
        samples = Samples(answer(0.9), OTHER)
        policy = AGREEING if state else AGREEING.replace("temperature: 0.9", "model: elsewhere")
        edge = Edge(samples, policy=policy)
        gate = asyncio.Event()
        samples.first.script = (gate, *samples.first.script)
        reading = asyncio.create_task(collect(edge.agent, ask()))
        await samples.first.begun.wait()
        for name, value in state.items():
            setattr(edge.local.runtime, name, value)
        gate.set()

        deltas, _ = await reading

        assert text_of(deltas) == HERE
        assert not samples.second.requests


async def test_another_model_of_this_device() -> None:
    """The second sample is asked of it by its name."""
    samples = Samples(answer(0.9), SAME)
    edge = Edge(samples, policy=AGREEING.replace("temperature: 0.9", "model: small"))

    await collect(edge.agent, ask())

    assert [request.model for request in samples.second.requests] == ["small"]


@pytest.mark.parametrize("label", ["edge_only", "free"])
async def test_what_is_not_judged_has_none(label: str) -> None:
    """A private request, and any that a rule decided."""
    samples = Samples(answer(0.3), SAME)
    rule = "" if label == "edge_only" else "rules: [{name: here, target: edge}]"
    edge = Edge(samples, policy=AGREEING + rule)

    deltas, _ = await collect(edge.agent, ask(label=label))

    assert text_of(deltas) == HERE
    assert not samples.second.requests


async def test_it_is_waited_for_only_so_long() -> None:
    """Then the first is judged alone, and the second is stopped."""
    samples = Samples(answer(0.9), (SAME[0], asyncio.Event()))
    edge = Edge(samples, policy=AGREEING.replace("min_tokens: 2", "min_tokens: 2, max_s: 0.05"))

    deltas, _ = await collect(edge.agent, ask())

    assert text_of(deltas) == HERE
    assert (len(samples.second.requests), samples.second.running) == (1, 0)


async def test_leaving_ends_it() -> None:
    """While both are drawn."""
    samples = Samples((*answer(0.9)[:1], asyncio.Event()), (SAME[0], asyncio.Event()))
    edge = Edge(samples, policy=AGREEING)
    reading = asyncio.create_task(collect(edge.agent, ask()))
    await samples.second.begun.wait()
    assert (samples.first.running, samples.second.running) == (1, 1)

    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)

    assert (samples.first.running, samples.second.running) == (0, 0)


@pytest.mark.parametrize("hold", ["sentence", "answer", "none"])
async def test_an_answer_from_the_cache_is_compared_once(hold: str) -> None:
    """The same answer to the same question is as sure as it was: no token is drawn for it again, and it is said to be
    as sure. Another question, or another way to draw, is compared anew."""
    samples = Samples(answer(0.9), SAME)
    edge = Edge(samples, policy=AGREEING.replace("threshold: 0.6", f"threshold: 0.6, hold: {hold}"), cache=True)
    reasons = []
    for _ in range(3):
        deltas, error = await collect(edge.agent, SETTLED)
        assert error is None
        assert text_of(deltas) == HERE
        reasons.append([route.reason for route in routes(deltas)][0 if hold != "none" else -1])
    assert len(samples.first.requests) == len(samples.second.requests) == 1
    assert [reason.count("cache hit") for reason in reasons] == [0, 1, 1]
    assert len({reason.partition("p 0.")[2] for reason in reasons}) == 1
    assert {kept.judged.heard.agreement for kept in edge.kept if kept.judged} == {edge.kept[0].judged.heard.agreement}  # type: ignore[union-attr]

    edge.policy = parse(AGREEING.replace("temperature: 0.9", "temperature: 0.8"))
    await collect(edge.agent, SETTLED)
    assert (len(samples.first.requests), len(samples.second.requests)) == (1, 2)


async def test_what_was_never_compared_is_compared_when_it_comes_from_the_cache() -> None:
    """An answer that was kept while no second sample was asked for; the switch is made by what it says."""
    samples = Samples(answer(0.9), OTHER)
    edge = Edge(samples, policy=POLICY.replace("threshold: 0.6", "threshold: 0.6, hold: answer"), cache=True)
    await collect(edge.agent, SETTLED)
    assert not samples.second.requests
    edge.policy = parse(AGREEING.replace("threshold: 0.6", "threshold: 0.6, hold: answer"))
    for _ in range(2):
        deltas, _ = await collect(edge.agent, SETTLED)
        assert text_of(deltas) == "from there"
    assert (len(samples.first.requests), len(samples.second.requests)) == (1, 1)


async def test_beside_an_answer_that_is_shown_at_once() -> None:
    """The stream begins before it is judged, and what the second sample says decides whether it switches."""
    samples = Samples(answer(0.9), OTHER)
    edge = Edge(samples, policy=AGREEING.replace("threshold: 0.6", "threshold: 0.6, hold: none, mark: '* * *'"))

    deltas, _ = await collect(edge.agent, msgspec.structs.replace(ask(), streamed=True))

    assert text_of(deltas) == "It is \n\n* * *\n\nfrom there"


@pytest.mark.model
async def test_a_real_model_is_asked_twice_at_once(model_path: Any) -> None:
    """Both are drawn together from the real model, the second as far as its first sentence."""
    backend = LlamaBackend(model_path, slots=2)
    await backend.start()
    drawn = SecondSample(temperature=0.5, max_tokens=24)
    rules = CascadeRules(threshold=0.5, second_sample=drawn)
    request = ChatRequest(
        id="r",
        model="edge",
        messages=(Message(role="user", content="What is the capital of France?"),),
        sampling=Sampling(temperature=0, max_tokens=24, logprobs=5),
    )
    second, tally = Second(request, drawn, rules, Local(backend), Compared()), Tally()
    try:
        async for delta in backend.answer(request):
            second.start()
            tally.push(delta)
        agreed = await second.agreement(tally.said, 60)
        await second.aclose()
    finally:
        await backend.aclose()
    assert tally.said
    assert agreed is not None
    assert 0 <= agreed <= 1
