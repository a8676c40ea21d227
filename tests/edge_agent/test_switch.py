"""Start at once and switch: the edge's answer is shown while it is judged, and the cloud's below it, under a mark."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cascade_parts import AT_ONCE, HERE, SURE, UNSURE, Edge, routes, said
from edge_apps import TOOL, edge
from edge_sides import LAST, THERE, Local, ask, collect
from fakes import ScriptedAnswer, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.backends.llama import LlamaBackend
from edge_agent.fences import open_fence
from router.cascade_rules import MARK
from router.records import decoded, encode
from shared.errors import BY_CODE, Unreachable, from_code
from shared.schemas import ChatRequest, Delta, Grammar, Label, Route, Sampling, Tool, Usage

BETWEEN = f"\n\n{MARK}\n\n"
SWITCHED = f"It is {BETWEEN}from there"


def asked(**fields: Any) -> ChatRequest:
    """As a surface asks for a client that reads a stream."""
    return msgspec.structs.replace(ask(), **{"streamed": True} | fields)


async def test_a_sure_answer_is_shown_as_it_comes() -> None:
    """Its first token waits for nothing; the last delta says how sure it was. Nothing was sent."""
    gate = asyncio.Event()
    edge = Edge((SURE[0], gate, *SURE[1:]), policy=AT_ONCE)
    deltas = edge.agent.answer(asked())

    first = await anext(deltas)
    assert (first.text, first.route) == (
        "It ",
        Route(target="edge", reason="mode prefer_edge; cascade: shown while it is judged", model="small"),
    )
    gate.set()
    rest = [delta async for delta in deltas]

    assert text_of([first, *rest]) == HERE
    assert [route.reason for route in routes(rest)] == ["mode prefer_edge; cascade: p 0.90 >= 0.60 (uncalibrated)"]
    assert not any(delta.logprobs for delta in [first, *rest])
    assert not edge.remote.seen


async def test_an_unsure_answer_goes_on_as_the_clouds_below_a_mark() -> None:
    """What was shown stays, then comes the mark, which says who answers from here on, then all of the cloud's."""
    edge = Edge(UNSURE, policy=AT_ONCE)

    deltas, error = await collect(edge.agent, asked())

    assert error is None
    assert text_of(deltas) == SWITCHED
    (mark,) = [delta for delta in deltas if delta.marks]
    assert (mark.text, mark.tokens) == (BETWEEN, 0)
    last = deltas[-1]
    assert mark.route is not None
    assert mark.route.switched is not None
    assert last.route == mark.route
    assert (mark.route.target, mark.route.model) == ("cloud", "large")
    assert mark.route.reason == "cascade: p 0.30 < 0.60 (uncalibrated)"
    above = mark.route.switched
    assert (above.target, above.model) == ("edge", "small")
    assert text_of(deltas)[above.starts_at :] == "from there"
    assert edge.here.running == 0


async def test_both_sides_count() -> None:
    """The usage is the sum, of which the edge's part is told; the end is the cloud's."""
    there = (*THERE[:2], msgspec.structs.replace(LAST, finish_reason="length"))
    edge = Edge(UNSURE, there, policy=AT_ONCE)

    deltas, _ = await collect(edge.agent, asked())

    last = deltas[-1]
    assert last.finish_reason == "length"
    assert last.usage == Usage(prompt_tokens=5 + 3, completion_tokens=2 + 2)
    assert last.route is not None
    assert last.route.switched is not None
    assert last.route.switched.usage == Usage(prompt_tokens=5, completion_tokens=2)


async def test_the_cloud_answers_the_question_afresh() -> None:
    """It gets what the client asked and nothing of the edge's beginning, nor of how its answer is read."""
    edge = Edge(UNSURE, policy=AT_ONCE)

    await collect(edge.agent, asked())

    assert edge.remote.seen == [ask()]


CHOOSY: list[dict[str, Any]] = [
    {"streamed": False},
    {"grammar": Grammar(syntax="json_schema", text='{"type":"object"}')},
    {"grammar": Grammar(syntax="regex", text="a+")},
    {"tools": (Tool(name="weather"),)},
    {"sampling": Sampling(logprobs=0)},
    {"messages": (), "prompt": "Hello"},
]


@pytest.mark.parametrize("fields", CHOOSY, ids=str)
async def test_where_two_answers_cannot_be_told_apart_it_is_held_back(fields: dict[str, Any]) -> None:
    """One piece, JSON, tools, tokens accounted for, raw text: judged by its first sentence before anything is shown."""
    edge = Edge(UNSURE, policy=AT_ONCE)

    deltas, error = await collect(edge.agent, asked(**fields))

    assert error is None
    assert text_of(deltas) == "from there"
    assert [route.switched for route in routes(deltas)] == [None, None]
    assert edge.here.yielded == 3


async def test_a_call_that_cannot_come_holds_nothing_back() -> None:
    """Tools that may not be called are no reason."""
    edge = Edge(UNSURE, policy=AT_ONCE)

    deltas, _ = await collect(edge.agent, asked(tools=(Tool(name="weather"),), tool_choice="none"))

    assert text_of(deltas) == SWITCHED


async def test_with_nothing_shown_there_is_no_mark() -> None:
    """An empty answer, or one that came whole: the cloud's stands alone."""
    for script in ((LAST,), (said("No. Never.", 0.2), LAST)):
        edge = Edge(script, policy=AT_ONCE.replace("min_tokens: 2", "min_tokens: 1"))

        deltas, _ = await collect(edge.agent, asked())

        assert text_of(deltas) == "from there"
        assert [(route.target, route.switched) for route in routes(deltas)] == [("cloud", None)] * 2


@pytest.mark.parametrize("code", sorted(BY_CODE))
async def test_a_cloud_that_fails_costs_nothing(code: str) -> None:
    """Before its first token: no mark, the edge's answer goes on to its end, and says why."""
    edge = Edge(UNSURE, (Delta(), from_code(code, "gone")), policy=AT_ONCE)

    deltas, error = await collect(edge.agent, asked())

    assert error is None
    assert len(edge.remote.seen) == 1
    assert text_of(deltas) == HERE
    assert not any(delta.marks for delta in deltas)
    assert [(route.target, route.failovers) for route in routes(deltas)] == [("edge", 0), ("edge", 1), ("edge", 1)]
    assert routes(deltas)[-1].reason == (
        f"mode prefer_edge; cascade: p 0.30 < 0.60 (uncalibrated); cloud {code}: gone; answered by the edge"
    )


async def test_below_the_mark_there_is_no_way_back() -> None:
    """The cloud's error ends the answer."""
    edge = Edge(UNSURE, (*THERE[:1], Unreachable("gone")), policy=AT_ONCE)

    deltas, error = await collect(edge.agent, asked())

    assert text_of(deltas) == f"It is {BETWEEN}from "
    assert isinstance(error, Unreachable)
    assert edge.here.running == 0


async def test_a_local_failure_is_the_edges_own() -> None:
    """What was shown stays; nobody takes over."""
    edge = Edge((UNSURE[0], Unreachable("gone")), policy=AT_ONCE)

    deltas, error = await collect(edge.agent, asked())

    assert text_of(deltas) == "It "
    assert isinstance(error, Unreachable)
    assert error.source == "edge"
    assert not edge.remote.seen


@pytest.mark.parametrize(
    ("label", "policy"),
    [
        ("edge_only", AT_ONCE),
        ("free", AT_ONCE.replace("prefer_edge", "only_edge")),
        ("free", AT_ONCE + "rules: [{name: here, target: edge}]"),
        ("free", AT_ONCE + "privacy: {personal: edge_only}"),
    ],
)
async def test_what_stays_never_switches(label: Label, policy: str) -> None:
    """However unsure: not one byte leaves, and nothing is judged."""
    edge = Edge(UNSURE, policy=policy)
    request = msgspec.structs.replace(ask("Mail jo@example.org", label=label), streamed=True)

    deltas, error = await collect(edge.agent, request)

    assert error is None
    assert text_of(deltas) == HERE
    assert not edge.remote.seen
    assert "cascade" not in routes(deltas)[-1].reason


async def test_personal_data_is_replaced_before_it_is_sent() -> None:
    """A request that switches goes through the same door as any other."""
    request = msgspec.structs.replace(ask("Write to jo.miller@example.org, please"), streamed=True)
    edge = Edge(UNSURE, policy=AT_ONCE)

    await collect(edge.agent, request)

    (sent,) = edge.remote.seen
    assert "jo.miller" not in sent.messages[0].content
    assert sent.label == "free"


async def test_a_fence_that_is_open_is_closed() -> None:
    """The mark is not read as code; a mark of the policy's own stands between empty lines."""
    script = (said("Look:\n", 0.3), said("```python\n", 0.3), said("x = 1\n", 0.3), said("y", 0.3), LAST)
    policy = AT_ONCE.replace("min_tokens: 2", "min_tokens: 4, mark: '  * * *  '")
    edge = Edge(script, policy=policy)

    deltas, _ = await collect(edge.agent, asked())

    assert text_of(deltas) == "Look:\n```python\nx = 1\n\n```\n\n* * *\n\nfrom there"


@pytest.mark.parametrize(
    ("text", "fence"),
    [
        ("", ""),
        ("```\nx\n```\n", ""),
        ("~~~~ py\nx\n```\n", "~~~~"),
        ("```\n```` \n", ""),
        ("a ``` b", ""),
        ("  ```", "```"),
    ],
)
def test_which_fence_is_open(text: str, fence: str) -> None:
    """As Markdown has it."""
    assert open_fence(text) == fence


async def test_the_cache_keeps_no_answer_of_two() -> None:
    """Asked again, the edge begins again, and below it the cloud's own answer, whole, is served from memory. Where the
    edge's was whole too, it is judged before any of it is shown, and the cloud's stands alone."""
    for script, again, asked_of_edge in (((*UNSURE[:3], asyncio.Event()), SWITCHED, 2), (UNSURE, "from there", 1)):
        edge = Edge(script, policy=AT_ONCE, cache=True)
        sampling = Sampling(temperature=0)

        replies = [(await collect(edge.agent, asked(id=f"r{at}", sampling=sampling)))[0] for at in range(2)]

        assert [text_of(deltas) for deltas in replies] == [SWITCHED, again]
        assert (len(edge.here.requests), len(edge.remote.seen)) == (asked_of_edge, 1)


async def test_it_is_counted_and_recorded() -> None:
    """The journal says that it switched, and keeps its encoding; its times teach no pace."""
    for script, switched in ((SURE, False), (UNSURE, True)):
        edge = Edge(script, policy=AT_ONCE)
        await collect(edge.agent, asked())

        (kept,) = edge.kept
        assert kept.outcome.switched is switched
        assert kept.outcome.served == ("cloud" if switched else "edge")
        assert kept.judged is not None
        assert not kept.went_well
        assert decoded(encode(kept)) == kept


STEP = st.one_of(
    st.builds(said, st.sampled_from(["a ", "b. ", "c\n"]), st.sampled_from([0.05, 0.5, 0.95])),
    st.sampled_from([Delta(), Delta(text="d", tokens=1), LAST]),
    st.sampled_from(sorted(BY_CODE)).map(lambda code: from_code(code, "scripted")),
)
SCRIPT = st.lists(STEP, max_size=8).map(tuple)


@settings(max_examples=200, deadline=None)
@given(here=SCRIPT, there=SCRIPT, chars=st.integers(1, 12))
def test_never_two_answers_without_a_mark(here: Any, there: Any, chars: int) -> None:
    """Whatever either side does: a beginning of the edge's, or of the cloud's, or of both with one mark between them;
    one end, one event, nothing running."""
    edge = Edge(here, there, policy=f"mode: prefer_edge\ncascade: {{threshold: 0.5, hold: none, max_chars: {chars}}}")

    deltas, error = asyncio.run(collect(edge.agent, asked()))

    finished = [delta for delta in deltas if delta.finish_reason is not None]
    assert (error is None) == (len(finished) == 1)
    assert len(edge.events) == 1
    assert edge.here.running == edge.there.running == 0
    marks = [at for at, delta in enumerate(deltas) if delta.marks]
    assert len(marks) <= 1
    parts = [(here, deltas[: marks[0]]), (there, deltas[marks[0] + 1 :])] if marks else []
    if not marks and deltas:
        parts = [(here if routes(deltas)[-1].target == "edge" else there, deltas)]
    for script, part in parts:
        produced = text_of([step for step in script if isinstance(step, Delta)])
        assert produced.startswith(text_of(part))
    targets = [route.target for route in routes(deltas)]
    assert targets == sorted(targets, reverse=True)
    assert len(set(targets)) <= 1 + len(marks)


async def test_a_stream_says_it_and_a_reply_in_one_piece_has_one_answer(tmp_path: Path) -> None:
    """Over HTTP: a client that streams may be shown both; one that does not, and one that asks for several choices or
    tools, gets the cloud's alone."""
    body: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}
    others = [{}, {"stream": True, "n": 2}, {"stream": True, "tools": [{"type": "function", "function": TOOL}]}]
    async with (
        edge(tmp_path, ScriptedAnswer(*UNSURE), ScriptedAnswer(*THERE), policy=AT_ONCE) as it,
        it.http() as http,
    ):
        streamed = await http.post("/v1/chat/completions", json=body | {"stream": True})
        held = [await http.post("/v1/chat/completions", json=body | other) for other in others]
        metrics = (await http.get("/metrics")).text

    assert streamed.headers["x-causeway-route"] == "edge"
    assert "The cloud's answer" in streamed.text
    for reply in held:
        assert reply.headers["x-causeway-route"] == "cloud"
        assert "from " in reply.text
        assert "The cloud's answer" not in reply.text
    assert "causeway_switches_total 1.0" in metrics


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat"])
async def test_the_last_event_says_who_ended_it(tmp_path: Path, path: str) -> None:
    """The headers were sent when the edge began, and say so; on every surface the end names the cloud, and the edge's
    part."""
    asks: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
    own = {"/v1/responses": {"input": "Hello"}, "/v1/messages": asks | {"max_tokens": 50}}
    body = {"model": "auto", "stream": True} | own.get(path, asks)
    async with (
        edge(tmp_path, ScriptedAnswer(*UNSURE), ScriptedAnswer(*THERE), policy=AT_ONCE) as it,
        it.http() as http,
    ):
        reply = await http.post(path, json=body)

    assert reply.headers["x-causeway-route"] == "edge"
    said = [line.removeprefix("data: ") for line in reply.text.splitlines() if '"causeway":' in line]
    assert len(said) >= 2
    last = json.loads(said[-1])
    route = (last.get("response") or last)["causeway"]
    assert (route["route"], route["switched"]["from"]) == ("cloud", "edge")


@pytest.mark.model
async def test_a_real_model_begins_and_the_cloud_goes_on(tmp_path: Path, model_path: Path) -> None:
    """Its first sentence streams, is judged by its own probabilities and second sample, and the cloud's answer stands
    below the mark; a private question to the same model is its own to answer."""
    backend = LlamaBackend(model_path, slots=2)
    await backend.start()
    policy = AT_ONCE.replace("threshold: 0.6", "threshold: 0.999, second_sample: {}")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": "auto", "messages": question, "stream": True, "temperature": 0, "max_tokens": 40}
    try:
        async with edge(tmp_path, Local(backend), ScriptedAnswer(*THERE), policy=policy) as it, it.http() as http:
            open_, private = [
                (await http.post("/v1/chat/completions", json=body, headers={"x-causeway-label": label})).text
                for label in ("free", "edge_only")
            ]
            kept = it.daemon.counts.by_target()
    finally:
        await backend.aclose()

    text = "".join(choice["delta"].get("content") or "" for choice in _choices(open_))
    above, mark, below = text.partition(BETWEEN)
    assert above.strip()
    assert mark
    assert below == "from there"
    assert len(_choices(private)) > 10
    assert "from there" not in private
    assert kept == {"cloud": {"done": 1}, "edge": {"done": 1}}


def _choices(stream: str) -> list[dict[str, Any]]:
    events = [json.loads(line.removeprefix("data: ")) for line in stream.split("\n\n") if line.startswith("data: {")]
    return [choice for event in events for choice in event["choices"]]
