"""OpenAI's Responses over scripted sides: objects, events, going on from earlier ones, what is refused."""

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest
from edge_apps import TOOL, edge
from edge_sides import HERE, Local, Remote, Turns
from fakes import EchoAnswer, ScriptedAnswer
from waiting import HANG_S

from edge_agent.api.responses.read import Turn
from edge_agent.api.responses.store import PreviousNotFound, ResponseStore, Stored
from shared.errors import NotFound, Overloaded, UpstreamFailed
from shared.keys import Keys, new_key
from shared.schemas import Delta, ToolPiece, Usage

PATH = "/v1/responses"
TOOLS: list[Any] = [{"type": "function", **TOOL}]
CALLS = (
    Delta(text="Wait.", tokens=3),
    Delta(tool_calls=(ToolPiece(0, "", "call_1", "weather"),), tokens=1),
    Delta(tool_calls=(ToolPiece(0, '{"city": "Rome"}'),), tokens=1),
    Delta(tool_calls=(ToolPiece(1, "{}", "call_2", "weather"),), tokens=1),
    Delta(finish_reason="tool_calls", usage=Usage(prompt_tokens=9, completion_tokens=4, cached_tokens=2)),
)
TEXT_EVENTS = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    "response.output_text.delta", "response.output_text.delta", "response.output_text.done",
    "response.content_part.done", "response.output_item.done", "response.completed",
]  # fmt: skip


def client(url: str, key: str = "any") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.mark.parametrize("target", ["edge", "cloud"])
async def test_the_official_client_reads_whole_and_streamed_replies(tmp_path: Path, target: str) -> None:
    """Text, status, usage and route; the events in their order, numbered from 0, on either route."""
    async with edge(tmp_path, EchoAnswer("edge"), EchoAnswer("cloud")) as it, client(it.url) as official:
        whole = await official.responses.create(model=target, input="one two", metadata={"a": "b"}, temperature=0.5)
        async with official.responses.stream(model=target, input="one two") as stream:
            events = [event async for event in stream]
            streamed = await stream.get_final_response()

    assert (whole.output_text, whole.status, whole.model) == ("one two ", "completed", target)
    assert (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.total_tokens) == (2, 2, 4)  # type: ignore[union-attr]
    assert (whole.metadata, whole.temperature, whole.service_tier) == ({"a": "b"}, 0.5, "default")
    assert whole.model_extra is not None
    assert whole.model_extra["causeway"]["route"] == target
    assert [event.type for event in events] == TEXT_EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert streamed.output_text == whole.output_text
    assert streamed.to_dict().keys() == whole.to_dict().keys()


async def test_calls_are_items_of_their_own(tmp_path: Path) -> None:
    """Whole and streamed: a message, then each call with its arguments; their events name the item and its place."""
    async with edge(tmp_path, ScriptedAnswer(*CALLS)) as it, client(it.url) as official:
        whole = await official.responses.create(model="edge", input="x", tools=TOOLS)
        chunks = [
            one async for one in await official.responses.create(model="edge", input="x", tools=TOOLS, stream=True)
        ]

    for response in (whole, chunks[-1].response):  # type: ignore[union-attr]
        assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
        calls = [(item.call_id, item.name, item.arguments, item.status) for item in response.output[1:]]
        assert calls == [
            ("call_1", "weather", '{"city": "Rome"}', "completed"),
            ("call_2", "weather", "{}", "completed"),
        ]
        assert response.usage.input_tokens_details.cached_tokens == 2
    kinds = [(one.type, getattr(one, "output_index", None)) for one in chunks]
    assert kinds[8:-1] == [
        ("response.output_item.added", 1), ("response.function_call_arguments.delta", 1),
        ("response.function_call_arguments.done", 1), ("response.output_item.done", 1),
        ("response.output_item.added", 2), ("response.function_call_arguments.delta", 2),
        ("response.function_call_arguments.done", 2), ("response.output_item.done", 2),
    ]  # fmt: skip


async def test_items_reach_the_side_as_messages(tmp_path: Path) -> None:
    """Instructions, texts in parts, calls and their outputs in order; tools, choice, format and limits are told."""
    echo = EchoAnswer()
    items: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "message", "role": "assistant", "id": "m", "status": "completed",
         "content": [{"type": "output_text", "text": "Wait.", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Rome"}', "id": "fc"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
    ]  # fmt: skip
    async with edge(tmp_path, echo) as it, client(it.url) as official:
        await official.responses.create(
            model="edge", input=items, instructions="Sing.", tools=TOOLS, tool_choice="auto", max_output_tokens=9,
            temperature=0.5, top_p=0.9, parallel_tool_calls=False, service_tier="flex",
            include=["message.output_text.logprobs"], top_logprobs=2,
        )  # fmt: skip
        await official.responses.create(
            model="edge", input="x", text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}
        )

    seen, plain = echo.requests
    assert [(one.role, one.content) for one in seen.messages] == [
        ("system", "Sing."), ("system", "Be brief."), ("user", "Hi"), ("assistant", "Wait."), ("tool", "sun"),
    ]  # fmt: skip
    assert (seen.messages[3].tool_calls[0].id, seen.messages[4].tool_call_id) == ("c1", "c1")
    assert (seen.sampling.max_tokens, seen.sampling.temperature, seen.sampling.logprobs) == (9, 0.5, 2)
    assert (seen.parallel_tool_calls, seen.priority, seen.tools[0].name) == (False, "batch", "weather")
    assert plain.grammar is not None
    assert plain.grammar.text == '{"type":"object"}'


async def test_a_response_can_be_gone_on_from_looked_at_and_deleted(tmp_path: Path) -> None:
    """The next turn sees all before it, but not the earlier instructions; what was not to be stored is not there."""
    echo = EchoAnswer()
    async with edge(tmp_path, echo) as it, client(it.url) as official:
        one = await official.responses.create(model="edge", input="one", instructions="Sing.")
        two = await official.responses.create(model="edge", input="two", previous_response_id=one.id)
        unstored = await official.responses.create(model="edge", input="three", store=False)
        again = await official.responses.retrieve(two.id)
        inputs = [item async for item in official.responses.input_items.list(two.id)]
        await official.responses.delete(one.id)
        for gone in (one.id, unstored.id, "resp_zap"):
            with pytest.raises(openai.NotFoundError):
                await official.responses.retrieve(gone)
        with pytest.raises(openai.BadRequestError) as missing:
            await official.responses.create(model="edge", input="x", previous_response_id=one.id)

    assert [(m.role, m.content) for m in echo.requests[1].messages] == [
        ("user", "one"),
        ("assistant", "one "),
        ("user", "two"),
    ]
    assert again.to_dict() == two.to_dict()
    assert [item.content[0].text for item in inputs] == ["two"]  # type: ignore[union-attr]
    assert (missing.value.param, missing.value.code) == ("previous_response_id", "previous_response_not_found")


async def test_a_private_turn_stays_private_when_gone_on_from(tmp_path: Path) -> None:
    """edge_only is inherited: the next turn repeats the earlier one's words, so it may not leave the device either."""
    remote = Remote(EchoAnswer("cloud"))
    async with edge(tmp_path, EchoAnswer(), remote, policy="mode: prefer_cloud") as it, client(it.url) as official:
        private = {"causeway": {"label": "edge_only"}}
        one = await official.responses.create(model="auto", input="secret", extra_body=private)
        two = await official.responses.create(model="auto", input="next", previous_response_id=one.id)
        await official.responses.create(model="auto", input="free")

    assert (two.model_extra or {})["causeway"]["route"] == "edge"
    assert [request.messages[-1].content for request in remote.seen] == ["free"]


async def test_tenants_do_not_see_each_others_responses(tmp_path: Path) -> None:
    """Neither to read, nor to go on from, nor to delete."""
    file = tmp_path / "keys"
    mine, theirs = (new_key(file, tenant, now=datetime(2026, 1, 1, tzinfo=UTC)) for tenant in ("a", "b"))
    keys = Keys(file, source="edge")
    async with edge(tmp_path, EchoAnswer(), keys=keys) as it, client(it.url, mine) as a, client(it.url, theirs) as b:
        one = await a.responses.create(model="edge", input="one")
        with pytest.raises(openai.NotFoundError):
            await b.responses.retrieve(one.id)
        with pytest.raises(openai.NotFoundError):
            await b.responses.delete(one.id)
        with pytest.raises(openai.BadRequestError):
            await b.responses.create(model="edge", input="x", previous_response_id=one.id)
        assert (await a.responses.retrieve(one.id)).id == one.id


async def test_a_cut_answer_is_incomplete(tmp_path: Path) -> None:
    """status, the reason, and the last event say so."""
    async with edge(tmp_path, EchoAnswer()) as it, client(it.url) as official:
        whole = await official.responses.create(model="edge", input="a b c", max_output_tokens=2)
        kinds = [
            e.type
            async for e in await official.responses.create(model="edge", input="a b", max_output_tokens=1, stream=True)
        ]

    assert (whole.status, whole.output[0].status) == ("incomplete", "incomplete")  # type: ignore[union-attr]
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert kinds[-1] == "response.incomplete"


async def test_errors_before_and_after_the_first_token(tmp_path: Path) -> None:
    """Before it a status with OpenAI's error object; after it response.failed, and nothing is stored."""
    async with edge(tmp_path, ScriptedAnswer(Overloaded("busy"))) as it, client(it.url) as official:
        with pytest.raises(openai.InternalServerError) as busy:
            await official.responses.create(model="edge", input="x", stream=True)
    side = ScriptedAnswer(HERE[0], UpstreamFailed("the engine died"))
    async with edge(tmp_path, side) as it, client(it.url) as official:
        events = [e async for e in await official.responses.create(model="edge", input="x", stream=True)]
        with pytest.raises(openai.NotFoundError):
            await official.responses.retrieve(events[0].response.id)  # type: ignore[union-attr]

    assert busy.value.status_code == 503
    failed = events[-1]
    assert failed.type == "response.failed"
    assert failed.response.error is not None
    assert failed.response.error.message == "the engine died"
    assert failed.response.status == "failed"


async def test_who_leaves_is_not_computed_for(tmp_path: Path) -> None:
    """Over HTTP and over the WebSocket."""
    side = ScriptedAnswer(HERE[0], asyncio.Event())
    async with edge(tmp_path, side) as it, client(it.url) as official:
        async with (
            it.http() as http,
            http.stream("POST", PATH, json={"model": "edge", "input": "x", "stream": True}) as r,
        ):
            await anext(r.aiter_bytes())
        await asyncio.wait_for(side.idle(), HANG_S)
        async with official.responses.connect() as connection:
            await connection.response.create(model="edge", input="x")
            await connection.recv()
        await asyncio.wait_for(side.idle(), HANG_S)

    assert len(side.closed) == 2


async def test_a_socket_answers_one_at_a_time_and_outlives_mistakes(tmp_path: Path) -> None:
    """A second request meanwhile, bytes, half a JSON text, another type, what only HTTP has: each an error event that
    names the field, and the response that runs is not disturbed; the next one is answered."""
    gate = asyncio.Event()
    side = Turns((HERE[0], gate, *HERE[1:]), HERE)
    async with edge(tmp_path, side) as it, client(it.url) as o, o.responses.connect() as connection:

        async def error_of(message: str) -> tuple[int, str, str | None]:
            await connection.send_raw(message)
            event = json.loads(await connection.recv_bytes())
            assert event["type"] == "error"
            return event["status"], event["error"]["code"], event["error"]["param"]

        await connection.response.create(model="edge", input="x")
        kinds = [(await connection.recv()).type for _ in range(5)]
        create = {"type": "response.create", "model": "edge", "input": "y"}
        assert await error_of(json.dumps(create)) == (409, "request_conflict", None)
        gate.set()
        while kinds[-1] != "response.completed":
            kinds.append((await connection.recv()).type)
        assert await error_of("{") == (400, "bad_request", None)
        assert await error_of("[]") == (400, "bad_request", None)
        assert await error_of('{"type": "response.steer"}') == (400, "unsupported_parameter", "type")
        assert await error_of(json.dumps(create | {"stream_id": "a"})) == (400, "bad_request", "stream_id")
        assert await error_of(json.dumps(create | {"generate": False})) == (400, "unsupported_parameter", "generate")
        await connection.send_raw(b"\x00\xff")
        assert json.loads(await connection.recv_bytes())["error"]["code"] == "bad_request"
        await connection.response.create(model="edge", input="z")
        again = [(await connection.recv()).type for _ in kinds]

    assert kinds == again == TEXT_EVENTS


async def test_on_a_socket_the_latest_turn_can_be_gone_on_from_unstored(tmp_path: Path) -> None:
    """With store false the connection knows its latest response, and nobody else does; the one before it is gone."""
    echo = EchoAnswer()

    async def finished(connection: Any) -> Any:
        async for event in connection:
            if event.type in ("response.completed", "error"):
                return event
        return None

    async with (
        edge(tmp_path, echo) as it,
        client(it.url) as official,
        official.responses.connect() as one,
        official.responses.connect() as other,
    ):
        await one.response.create(model="edge", input="a", store=False)
        first = (await finished(one)).response.id
        await one.response.create(model="edge", input="b", store=False, previous_response_id=first)
        await finished(one)
        for connection in (one, other):
            await connection.response.create(model="edge", input="c", previous_response_id=first)
            assert (await finished(connection)).error.code == "previous_response_not_found"

    assert [message.content for message in echo.requests[1].messages] == ["a", "a ", "b"]


async def test_a_key_that_is_taken_back_opens_nothing_more(tmp_path: Path) -> None:
    """Also on a connection that it opened."""
    file = tmp_path / "keys"
    key = new_key(file, "a", now=datetime(2026, 1, 1, tzinfo=UTC))
    other = tmp_path / "other"
    new_key(other, "b", now=datetime(2026, 1, 1, tzinfo=UTC))
    async with (
        edge(tmp_path, EchoAnswer(), keys=Keys(file, source="edge")) as it,
        client(it.url, key) as official,
        official.responses.connect() as connection,
    ):
        file.write_bytes(other.read_bytes())
        await connection.response.create(model="edge", input="x")
        event = await connection.recv()

    assert event.type == "error"
    assert event.status == 401


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("no input", {"input": None}, "input", "bad_request"),
    ("empty input", {"input": []}, "input", "bad_request"),
    ("image", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
     "input[0].content[0].type", "unsupported_parameter"),
    ("item", {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "unsupported_parameter"),
    ("role", {"input": [{"role": "root", "content": "x"}]}, "input[0].role", "bad_request"),
    ("arguments", {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
     "input[0].arguments", "bad_request"),
    ("background", {"background": True}, "background", "unsupported_parameter"),
    ("conversation", {"conversation": "c"}, "conversation", "unsupported_parameter"),
    ("truncation", {"truncation": "auto"}, "truncation", "unsupported_parameter"),
    ("reasoning", {"reasoning": {"effort": "high"}}, "reasoning", "unsupported_parameter"),
    ("include", {"include": ["file_search_call.results"]}, "include[0]", "unsupported_parameter"),
    ("verbosity", {"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
    ("tool", {"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
    ("tool's schema", {"tools": [{"type": "function", "name": "f", "parameters": {"type": "zap"}}]},
     "tools[0].parameters", "bad_request"),
    ("choice", {"tool_choice": "zap"}, "tool_choice", "bad_request"),
    ("choice of nothing", {"tool_choice": "required"}, "tool_choice", "bad_request"),
    ("format", {"text": {"format": {"type": "xml"}}}, "text.format", "bad_request"),
    ("limit", {"max_output_tokens": 0}, "max_output_tokens", "bad_request"),
    ("limit 2^63", {"max_output_tokens": 1 << 63}, "max_output_tokens", "bad_request"),
    ("temperature", {"temperature": True}, "temperature", "bad_request"),
    ("top_logprobs alone", {"top_logprobs": 2}, "top_logprobs", "bad_request"),
    ("tier", {"service_tier": "gold"}, "service_tier", "bad_request"),
    ("unknown", {"zap": 1}, "zap", "bad_request"),
    ("unknown model", {"model": "zap"}, "model", "model_not_found"),
]  # fmt: skip


async def test_bad_bodies_are_refused_by_name(tmp_path: Path) -> None:
    """S-18: each body of the table gets its field and code, and no side is asked; over the WebSocket too."""
    local = Local(EchoAnswer())
    async with edge(tmp_path, local) as it, it.http() as http, client(it.url) as o, o.responses.connect() as connection:
        for name, fields, param, code in REFUSED:
            body = {"model": "auto", "input": "hi"} | fields
            reply = await http.post(PATH, json=body)
            said = reply.json()["error"]
            assert (said["param"], said["code"]) == (param, code), name
            assert reply.status_code == (404 if code == "model_not_found" else 400), name
            await connection.send_raw(json.dumps(body | {"type": "response.create"}))
            event = json.loads(await connection.recv_bytes())
            assert (event["type"], event["status"]) == ("error", reply.status_code), name
            assert event["error"] == said, name

    assert not local.inner.requests  # type: ignore[attr-defined]


def stored(size: int) -> Stored:
    return Stored({"id": "x"}, [], Turn((), "free"), size)


def test_the_store_is_bounded_in_bytes_and_time() -> None:
    """The oldest go first, a tenant's own before anybody else's; after their time all are gone."""
    now = [0.0]
    store = ResponseStore(max_bytes=100, tenant_bytes=60, ttl_s=10, clock=lambda: now[0])
    for name in ("1", "2", "3"):
        store.put("a", name, stored(30))
    store.put("b", "4", stored(50))
    store.put("b", "5", stored(61))

    def kept() -> list[str]:
        found = []
        for tenant, name in (("a", "1"), ("a", "2"), ("a", "3"), ("b", "4"), ("b", "5")):
            try:
                store.get(tenant, name)
                found.append(name)
            except NotFound:
                pass
        return found

    assert kept() == ["3", "4"]
    now[0] = 10.0
    assert kept() == []
    with pytest.raises(PreviousNotFound):
        store.turn("a", "3")
