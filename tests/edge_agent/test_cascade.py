"""The cascade: the edge's answer is judged before it is shown, and the cloud's may take its place."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cascade_parts import AT_ONCE, HERE, POLICY, SURE, UNSURE, Edge, routes, said
from edge_apps import edge
from edge_sides import LAST, THERE, ask, collect
from fakes import ScriptedAnswer, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.cascade import Trial
from router.cascade_rules import CascadeRules
from router.records import decoded, encode
from shared.errors import BY_CODE, Unreachable, from_code
from shared.schemas import ChatRequest, Delta, Grammar, Label, ModelCard, Route, Sampling

WHOLE = "mode: prefer_edge\ncascade: {threshold: 0.6, hold: answer}\n"


async def test_a_sure_answer_is_shown() -> None:
    """It is the edge's, whole, says how sure it was, and nothing was sent."""
    edge = Edge(SURE)

    deltas, error = await collect(edge.agent, ask())

    assert error is None
    assert text_of(deltas) == HERE
    assert (
        routes(deltas)
        == [Route(target="edge", reason="mode prefer_edge; cascade: p 0.90 >= 0.60 (uncalibrated)", model="small")] * 2
    )
    assert not edge.remote.seen


async def test_an_unsure_answer_is_the_clouds_to_give() -> None:
    """From its start, with its usage; the edge's is ended and nothing of it is shown."""
    edge = Edge(UNSURE)

    deltas, error = await collect(edge.agent, ask())

    assert error is None
    assert text_of(deltas) == "from there"
    assert deltas[-1].usage == LAST.usage
    assert routes(deltas) == [Route(target="cloud", reason="cascade: p 0.30 < 0.60 (uncalibrated)", model="large")] * 2
    assert edge.here.running == 0
    assert edge.here.yielded == 3  # up to the end of its first sentence
    assert edge.events[0].route is not None
    assert edge.events[0].route.target == "cloud"


@pytest.mark.parametrize("code", sorted(BY_CODE))
async def test_a_cloud_that_fails_costs_nothing(code: str) -> None:
    """Before its first token: the edge's answer, which was kept, is shown after all, and says why."""
    edge = Edge(UNSURE, (Delta(), from_code(code, "gone")))

    deltas, error = await collect(edge.agent, ask())

    assert error is None
    assert len(edge.remote.seen) == 1
    assert text_of(deltas) == HERE
    for route in routes(deltas):
        assert route.reason == (
            f"mode prefer_edge; cascade: p 0.30 < 0.60 (uncalibrated); cloud {code}: gone; answered by the edge"
        )
        assert (route.target, route.failovers) == ("edge", 1)


async def test_after_the_clouds_first_token_there_is_no_way_back() -> None:
    """Its error ends the answer: the edge's is not put behind it."""
    edge = Edge(UNSURE, (*THERE[:1], Unreachable("gone")))

    deltas, error = await collect(edge.agent, ask())

    assert text_of(deltas) == "from "
    assert isinstance(error, Unreachable)
    assert edge.here.running == 0


@pytest.mark.parametrize(
    ("label", "policy", "model"),
    [
        ("edge_only", POLICY, "auto"),
        ("free", POLICY, "edge"),
        ("free", POLICY, "small"),
        ("free", POLICY.replace("prefer_edge", "only_edge"), "auto"),
        ("free", POLICY + "rules: [{name: here, target: edge}]", "auto"),
    ],
)
async def test_what_stays_is_not_judged(label: Label, policy: str, model: str) -> None:
    """A label, a requested model, the mode or a rule have decided: the edge's answer is shown as it comes."""
    edge = Edge(UNSURE, policy=policy)

    deltas, error = await collect(edge.agent, ask(label=label, model=model))

    assert error is None
    assert text_of(deltas) == HERE
    assert "cascade" not in routes(deltas)[0].reason
    assert not edge.remote.seen
    assert edge.here.requests[0].sampling.logprobs is None


async def test_nothing_is_held_back_for_a_cloud_that_is_not_there() -> None:
    """While it is disconnected, the edge's answer is shown at once."""
    edge = Edge(UNSURE)
    edge.remote.state.connected = False

    deltas, _ = await collect(edge.agent, ask())

    assert text_of(deltas) == HERE
    assert edge.here.requests[0].sampling.logprobs is None


async def test_personal_data_is_replaced_before_it_is_sent() -> None:
    """A request that is escalated goes through the same door as any other."""
    edge = Edge(UNSURE)

    await collect(edge.agent, ask("Write to jo.miller@example.org, please"))

    (sent,) = edge.remote.seen
    assert "jo.miller" not in sent.messages[0].content
    assert sent.label == "free"
    assert "jo.miller" in edge.here.requests[0].messages[0].content


@pytest.mark.parametrize("wanted", [None, 0, 2, 7])
async def test_the_client_sees_the_logprobs_it_asked_for(wanted: int | None) -> None:
    """The edge is asked for five rivals or more, the client gets its own number; the cloud is asked for just that."""
    for script in (SURE, UNSURE):
        edge = Edge(script)
        request = ChatRequest(id="r", model="auto", messages=ask().messages, sampling=Sampling(logprobs=wanted))

        deltas, _ = await collect(edge.agent, request)

        assert edge.here.requests[0].sampling.logprobs == max(wanted or 0, 5)
        assert all(sent.sampling.logprobs == wanted for sent in edge.remote.seen)
        if script is SURE:
            shown = [len(token.top) for delta in deltas for token in delta.logprobs]
            assert shown == ([] if wanted is None else [min(wanted, 5)] * 5)


async def test_a_whole_answer_is_held_where_the_policy_says_so() -> None:
    """Nothing comes before the last token; a bad end counts, too."""
    script = (*(said("x ", 0.9) for _ in range(3)), said("no. ", 0.01), said("end", 0.01), LAST)

    whole, sentence = Edge(script, policy=WHOLE), Edge(script, policy=POLICY.replace("min_tokens: 2", "max_chars: 4"))
    by_all, _ = await collect(whole.agent, ask())
    by_beginning, _ = await collect(sentence.agent, ask())

    assert text_of(by_all) == "from there"
    assert whole.here.yielded == len(script)
    assert text_of(by_beginning) == "x x x no. end"


async def test_what_is_held_is_bounded() -> None:
    """In characters and in time from the first token on: then what there is is judged."""
    chars = CascadeRules(threshold=0.5, hold="answer", max_chars=10)
    seconds = CascadeRules(threshold=0.5, hold="answer", max_s=3.0)
    card = ModelCard(id="small", context_length=100)
    now = 0.0

    async def endless(step: float) -> Any:
        nonlocal now
        while True:
            now += step
            yield said("word ", 0.9)

    short, slow = Trial(ask(), chars, card, lambda: now), Trial(ask(), seconds, card, lambda: now)
    for trial, step in ((short, 0.0), (slow, 2.0)):
        async with aclosing(endless(step)) as deltas:
            assert not [delta async for delta in trial.hear(deltas)]
            assert (await trial.judged()).good

    assert [text_of(short.held), text_of(slow.held)] == ["word word ", "word word word "]


async def test_a_local_failure_is_the_edges_own() -> None:
    """While its answer is held back, its error ends the request, as it would without a cascade."""
    edge = Edge((UNSURE[0], Unreachable("gone")))

    deltas, error = await collect(edge.agent, ask())

    assert not deltas
    assert isinstance(error, Unreachable)
    assert error.source == "edge"
    assert not edge.remote.seen


@pytest.mark.parametrize(
    ("script", "flaw"),
    [
        ((LAST,), "is empty"),
        ((said(" \n", 0.99), LAST), "is empty"),
        ((*(said("to be sure ", 0.99) for _ in range(40)), LAST), "repeats itself"),
    ],
)
async def test_some_answers_are_bad_however_sure(script: tuple[Delta, ...], flaw: str) -> None:
    """No probability makes them good."""
    edge = Edge(script, policy=WHOLE)

    deltas, _ = await collect(edge.agent, ask())

    assert text_of(deltas) == "from there"
    assert routes(deltas)[0].reason == f"cascade: the local answer {flaw}"


async def test_json_cut_short_is_bad() -> None:
    """Asked for by a schema and not come to its end."""
    edge = Edge((said('{"a": 1', 0.99), LAST), policy=WHOLE)
    request = ChatRequest(
        id="r", model="auto", messages=ask().messages, grammar=Grammar(syntax="json_schema", text='{"type":"object"}')
    )

    deltas, _ = await collect(edge.agent, request)

    assert routes(deltas)[0].reason == "cascade: the local answer is not the JSON asked for"


async def test_the_journal_has_the_signals_and_no_text() -> None:
    """One row a request: what was heard, what was made of it, who served; it outlives its encoding, and its times teach
    no pace."""
    for script, served in ((SURE, "edge"), (UNSURE, "cloud")):
        edge = Edge(script)
        await collect(edge.agent, ask())

        (kept,) = edge.kept
        assert kept.judged is not None
        assert (kept.target, kept.outcome.served, kept.judged.good) == ("edge", served, served == "edge")
        assert (kept.judged.heard.tokens, kept.judged.heard.whole) == (3, False)
        assert not kept.went_well
        assert decoded(encode(kept)) == kept
        assert b"here" not in encode(kept)


async def test_both_answers_may_come_from_the_cache() -> None:
    """Asked again, the same answer is judged the same, and no model works."""
    for script in (SURE, UNSURE):
        edge = Edge(script, cache=True, policy=WHOLE)
        sampling = Sampling(temperature=0)
        asked = [ChatRequest(id=f"r{at}", model="auto", messages=ask().messages, sampling=sampling) for at in range(2)]

        first, second = [(await collect(edge.agent, request))[0] for request in asked]

        assert text_of(first) == text_of(second)
        assert len(edge.here.requests) == 1
        assert len(edge.remote.seen) == (script is UNSURE)
        assert routes(second)[0].cached is not None
        assert routes(second)[0].cached.use == "hit"


@pytest.mark.parametrize("policy", [POLICY, AT_ONCE], ids=["held back", "shown at once"])
async def test_leaving_ends_both_sides(policy: str) -> None:
    """While the cloud has not begun, both are at work; closing the stream ends both."""
    edge = Edge((*UNSURE[:-1], asyncio.Event()), (asyncio.Event(),), policy=policy)
    reading = asyncio.create_task(collect(edge.agent, msgspec.structs.replace(ask(), streamed=True)))
    await edge.there.begun.wait()
    assert (edge.here.running, edge.there.running) == (1, 1)

    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)

    assert (edge.here.running, edge.there.running) == (0, 0)
    assert [event.outcome for event in edge.events] == ["cancelled"]


async def test_what_is_left_of_the_deadline_is_the_clouds() -> None:
    """Time that the edge took is not given twice."""
    ticks = iter(range(100))
    request = ChatRequest(id="r", model="auto", messages=ask().messages, deadline_s=10.0)
    card = ModelCard(id="small", context_length=100)
    trial = Trial(request, CascadeRules(threshold=0.5), card, lambda: float(next(ticks)))

    assert trial.late().deadline_s == 9.0
    assert trial.request.deadline_s == 10.0


async def test_a_client_is_told_in_the_headers(tmp_path: Path) -> None:
    """The reply names the side whose answer it is, and why; a plan says that the answer would be judged."""
    body = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    for script, target, reason in ((SURE, "edge", "p 0.90 >= 0.60"), (UNSURE, "cloud", "p 0.30 < 0.60")):
        async with (
            edge(tmp_path, ScriptedAnswer(*script), ScriptedAnswer(*THERE), policy=POLICY) as it,
            it.http() as http,
        ):
            reply = await http.post("/v1/chat/completions", json=body)
            plan = (await http.post("/v1/route", json=body)).json()

        assert reply.headers["x-causeway-route"] == target
        assert f"cascade: {reason}" in reply.headers["x-causeway-reason"]
        assert "logprob" not in reply.text.replace('"logprobs":null', "")
        assert (plan["target"], plan["escalates"]) == ("edge", True)


STEP = st.one_of(
    st.builds(said, st.sampled_from(["a ", "b. ", "c\n"]), st.sampled_from([0.05, 0.5, 0.95])),
    st.sampled_from([Delta(), Delta(text="d", tokens=1), LAST]),
    st.sampled_from(sorted(BY_CODE)).map(lambda code: from_code(code, "scripted")),
)
SCRIPT = st.lists(STEP, max_size=8).map(tuple)


@settings(max_examples=200, deadline=None)
@given(here=SCRIPT, there=SCRIPT, hold=st.sampled_from(["sentence", "answer"]), chars=st.integers(1, 12))
def test_the_client_sees_a_beginning_of_one_sides_answer(here: Any, there: Any, hold: str, chars: int) -> None:
    """Whatever either side does: one end, one event, and never a word of two models in one answer."""
    rules = f"{{threshold: 0.5, hold: {hold}, min_tokens: 1, max_chars: {chars}}}"
    edge = Edge(here, there, policy=f"mode: prefer_edge\ncascade: {rules}")

    deltas, error = asyncio.run(collect(edge.agent, ask()))

    finished = [delta for delta in deltas if delta.finish_reason is not None]
    assert (error is None) == (len(finished) == 1)
    assert len(edge.events) == 1
    assert all(not delta.logprobs for delta in deltas if routes(deltas)[0].target == "edge")
    if deltas:
        (target,) = {route.target for route in routes(deltas)}
        script = here if target == "edge" else there
        script = script[: script.index(LAST) + 1] if LAST in script else script
        produced = text_of([step for step in script if isinstance(step, Delta)])
        assert produced == text_of(deltas) if finished else produced.startswith(text_of(deltas))
        assert deltas[0].route is not None
    assert edge.here.running == edge.there.running == 0
    assert max(len(edge.here.requests), len(edge.there.requests)) <= 1
