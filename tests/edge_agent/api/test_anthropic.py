"""The Anthropic surface over scripted sides: what the official client gets, what reaches a side, what is refused."""

import asyncio
import json
from pathlib import Path
from typing import Any

import anthropic
import pytest
from edge_apps import TOOL, edge
from edge_sides import HERE, LAST, Local
from fakes import EchoAnswer, ScriptedAnswer
from waiting import HANG_S

from shared.errors import CausewayError, Overloaded, RateLimited, UpstreamFailed
from shared.schemas import Delta, ToolPiece, Usage

MESSAGES = "/v1/messages"
HELLO: list[Any] = [{"role": "user", "content": "Hello there my friend"}]
TOOLS: list[Any] = [{"name": TOOL["name"], "input_schema": TOOL["parameters"]}]
USAGE = Usage(prompt_tokens=9, completion_tokens=4, cached_tokens=2)
CALLS = (
    Delta(text="Let me see.", tokens=3),
    Delta(tool_calls=(ToolPiece(0, "", "call_1", "weather"),), tokens=1),
    Delta(tool_calls=(ToolPiece(0, '{"city": '), ToolPiece(0, '"Rome"}')), tokens=1),
    Delta(tool_calls=(ToolPiece(1, "{}", "call_2", "weather"),), tokens=1),
    Delta(finish_reason="tool_calls", usage=USAGE),
)


def client(url: str, key: str = "any") -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0, timeout=60)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "auto", "max_tokens": 16, "messages": HELLO} | fields


@pytest.mark.parametrize("target", ["edge", "cloud"])
async def test_the_official_client_reads_whole_and_streamed_replies(tmp_path: Path, target: str) -> None:
    """Text, stop reason, usage and route, in one piece and as events, on either route."""
    async with edge(tmp_path, EchoAnswer("edge"), EchoAnswer("cloud")) as it, client(it.url) as official:
        whole = await official.messages.create(model=target, max_tokens=9, messages=HELLO)
        async with official.messages.stream(model=target, max_tokens=2, messages=HELLO, system="Be brief.") as stream:
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_message()

    assert whole.content[0].text.split() == HELLO[0]["content"].split()  # type: ignore[union-attr]
    assert (whole.role, whole.type, whole.model, whole.stop_reason) == ("assistant", "message", target, "end_turn")
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (4, 4)
    assert whole.model_extra is not None
    assert whole.model_extra["causeway"]["route"] == target
    assert streamed.stop_reason == "max_tokens"
    assert (streamed.usage.input_tokens, streamed.usage.output_tokens) == (4, 2)
    assert kinds[0] == "message_start"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


async def test_a_stream_has_anthropics_events_in_order(tmp_path: Path) -> None:
    """message_start, ping, a block for the text and one for each call, message_delta with the usage, message_stop."""
    async with edge(tmp_path, ScriptedAnswer(*CALLS)) as it, it.http() as http:
        reply = await http.post(MESSAGES, json=body(stream=True, tools=TOOLS))

    events = [event.split("\n") for event in reply.text.strip().split("\n\n")]
    data = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert [lines[0] for lines in events] == [f"event: {one['type']}" for one in data]
    assert [(one["type"], one.get("index")) for one in data] == [
        ("message_start", None), ("ping", None),
        ("content_block_start", 0), ("content_block_delta", 0), ("content_block_stop", 0),
        ("content_block_start", 1), ("content_block_delta", 1), ("content_block_delta", 1), ("content_block_stop", 1),
        ("content_block_start", 2), ("content_block_delta", 2), ("content_block_stop", 2),
        ("message_delta", None), ("message_stop", None),
    ]  # fmt: skip
    assert data[5]["content_block"] == {"type": "tool_use", "id": "call_1", "name": "weather", "input": {}}
    assert data[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert data[-2]["usage"]["cache_read_input_tokens"] == 2
    assert data[-2]["usage"]["input_tokens"] == 7
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-causeway-route"] == "edge"


async def test_calls_reach_the_client_as_objects(tmp_path: Path) -> None:
    """Whole and streamed: the same tool_use blocks, their input decoded."""
    async with edge(tmp_path, ScriptedAnswer(*CALLS)) as it, client(it.url) as official:
        whole = await official.messages.create(model="edge", max_tokens=9, messages=HELLO, tools=TOOLS)
        async with official.messages.stream(model="edge", max_tokens=9, messages=HELLO, tools=TOOLS) as stream:
            streamed = await stream.get_final_message()

    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
        assert [block.input for block in message.content[1:]] == [{"city": "Rome"}, {}]  # type: ignore[union-attr]


async def test_a_conversation_with_tools_reaches_the_side_whole(tmp_path: Path) -> None:
    """System blocks, calls, results and text become messages in their order; tools and choice are told."""
    echo = EchoAnswer()
    turns = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "text", "text": "Wait."}, {"type": "tool_use", "id": "c1", "name":
         "weather", "input": {"city": "Rome"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sun"}]},
            {"type": "tool_result", "tool_use_id": "c2", "content": "gone", "is_error": True},
            {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
        ]},
    ]  # fmt: skip
    async with edge(tmp_path, echo) as it, client(it.url) as official:
        await official.messages.create(
            model="edge", max_tokens=9, messages=turns, tools=TOOLS,
            system=[{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}], stop_sequences=["zebra"],
            tool_choice={"type": "auto", "disable_parallel_tool_use": True}, metadata={"user_id": "me"},
            thinking={"type": "disabled"}, service_tier="auto",
            extra_body={"temperature": 0.5, "top_k": 7, "top_p": 0.9},
        )  # fmt: skip

    (seen,) = echo.requests
    assert [(one.role, one.content) for one in seen.messages] == [
        ("system", "Be brief."), ("user", HELLO[0]["content"]), ("assistant", "Wait."), ("tool", "sun"),
        ("tool", "Error: gone"), ("user", "And?"),
    ]  # fmt: skip
    assert seen.messages[2].tool_calls[0].arguments == '{"city":"Rome"}'
    assert [one.tool_call_id for one in seen.messages[3:5]] == ["c1", "c2"]
    assert (seen.sampling.temperature, seen.sampling.top_k, seen.sampling.top_p) == (0.5, 7, 0.9)
    assert (seen.sampling.max_tokens, seen.sampling.stop) == (9, ("zebra",))
    assert (seen.tool_choice, seen.parallel_tool_calls, seen.tools[0].name) == ("auto", False, "weather")


@pytest.mark.parametrize(
    ("choice", "seen"),
    [
        ({"type": "any"}, ("required", ())),
        ({"type": "tool", "name": "weather"}, ("required", ("weather",))),
        ({"type": "none"}, ("none", ())),
    ],
)
async def test_the_choice_of_tools_is_told(tmp_path: Path, choice: Any, seen: Any) -> None:
    """`any` is required, `tool` is required of one."""
    echo = EchoAnswer()
    async with edge(tmp_path, echo) as it, it.http() as http:
        assert (await http.post(MESSAGES, json=body(tools=TOOLS, tool_choice=choice))).status_code == 200

    assert (echo.requests[0].tool_choice, echo.requests[0].allowed_tools) == seen


async def test_the_stop_sequence_that_ended_an_answer_is_named(tmp_path: Path) -> None:
    """stop_reason is stop_sequence, and which one it was is said."""
    last = Delta(finish_reason="stop", usage=USAGE, stop="zebra")
    async with edge(tmp_path, ScriptedAnswer(HERE[0], last)) as it, client(it.url) as official:
        message = await official.messages.create(model="edge", max_tokens=9, messages=HELLO, stop_sequences=["zebra"])

    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "zebra")


async def test_a_schema_becomes_the_grammar(tmp_path: Path) -> None:
    """output_config.format is what the answer must look like."""
    echo = EchoAnswer()
    config = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    async with edge(tmp_path, echo) as it, it.http() as http:
        assert (await http.post(MESSAGES, json=body(output_config=config))).status_code == 200

    grammar = echo.requests[0].grammar
    assert grammar is not None
    assert (grammar.syntax, grammar.text) == ("json_schema", '{"type":"object"}')


async def test_tokens_are_counted_without_answering(tmp_path: Path) -> None:
    """count_tokens needs no max_tokens, and no side answers anything."""
    local = Local(EchoAnswer(), tokens=7)
    async with edge(tmp_path, local) as it, client(it.url) as official:
        count = await official.messages.count_tokens(model="edge", messages=HELLO, system="Be brief.", tools=TOOLS)

    assert count.input_tokens == 7
    assert not local.inner.requests  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RateLimited("slow down", retry_after=2), anthropic.RateLimitError),
        (Overloaded("busy"), anthropic.APIStatusError),
    ],
)
async def test_errors_of_a_side_have_anthropics_shape(tmp_path: Path, error: CausewayError, kind: Any) -> None:
    """Before the first token: the real status and an error object; the client raises its own class."""
    async with edge(tmp_path, ScriptedAnswer(error)) as it, client(it.url) as official:
        with pytest.raises(kind) as raised:
            await official.messages.create(model="edge", max_tokens=9, messages=HELLO)

    assert raised.value.status_code == error.status
    assert raised.value.body["type"] == "error"
    assert raised.value.body["error"]["code"] == error.code


async def test_a_cut_after_the_first_token_is_an_error_event(tmp_path: Path) -> None:
    """The client raises it; no message_stop follows."""
    side = ScriptedAnswer(HERE[0], UpstreamFailed("the engine died"))
    async with edge(tmp_path, side) as it:
        async with (
            client(it.url) as official,
            official.messages.stream(model="edge", max_tokens=9, messages=HELLO) as s,
        ):
            with pytest.raises(anthropic.APIStatusError, match="the engine died"):
                await s.get_final_message()
        async with it.http() as http:
            reply = await http.post(MESSAGES, json=body(stream=True))

    assert "event: error" in reply.text
    assert "message_stop" not in reply.text


async def test_who_leaves_is_not_computed_for(tmp_path: Path) -> None:
    """A stream that the client drops ends its answer."""
    side = ScriptedAnswer(HERE[0], asyncio.Event())
    async with edge(tmp_path, side) as it, it.http() as http:
        async with http.stream("POST", MESSAGES, json=body(stream=True)) as reply:
            await anext(reply.aiter_bytes())
        await asyncio.wait_for(side.idle(), HANG_S)

    assert side.closed


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("no limit", {"max_tokens": None}, "max_tokens", "bad_request"),
    ("limit zero", {"max_tokens": 0}, "max_tokens", "bad_request"),
    ("limit a string", {"max_tokens": "5"}, "max_tokens", "bad_request"),
    ("no messages", {"messages": []}, "messages", "bad_request"),
    ("role system", {"messages": [{"role": "system", "content": "x"}]}, "messages[0].role", "bad_request"),
    ("a prefill", {"messages": [*HELLO, {"role": "assistant", "content": "{"}]}, "messages[1]",
     "unsupported_parameter"),
    ("image", {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
     "messages[0].content[0].type", "unsupported_parameter"),
    ("unknown in block", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "zap": 1}]}]},
     "messages[0].content[0].zap", "bad_request"),
    ("thinking", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking", "unsupported_parameter"),
    ("server tool", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type",
     "unsupported_parameter"),
    ("bad schema", {"tools": [{"name": "f", "input_schema": {"type": "zap"}}]}, "tools[0].input_schema", "bad_request"),
    ("bad name", {"tools": [{"name": "f g", "input_schema": {}}]}, "tools[0].name", "bad_request"),
    ("choice of nothing", {"tool_choice": {"type": "any"}}, "tool_choice", "bad_request"),
    ("choice unknown", {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "zap"}}, "tool_choice", "bad_request"),
    ("choice unnamed", {"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice", "bad_request"),
    ("17 stops", {"stop_sequences": ["x"] * 17}, "stop_sequences", "bad_request"),
    ("tier", {"service_tier": "gold"}, "service_tier", "bad_request"),
    ("container", {"container": "c"}, "container", "unsupported_parameter"),
    ("unknown", {"zap": 1}, "zap", "bad_request"),
    ("bool for a number", {"temperature": True}, "temperature", "bad_request"),
    ("too warm", {"temperature": 3}, "temperature", "bad_request"),
    ("format", {"output_config": {"format": {"type": "text", "schema": {}}}}, "output_config.format.type",
     "bad_request"),
    ("deadline", {"causeway": {"deadline_s": 0}}, "causeway.deadline_s", "bad_request"),
    ("unknown model", {"model": "claude-17"}, "model", "model_not_found"),
]  # fmt: skip


async def test_bad_bodies_are_refused_by_name(tmp_path: Path) -> None:
    """S-18: each body of the table gets its field and code in Anthropic's error object, and no side is asked."""
    local = Local(EchoAnswer())
    async with edge(tmp_path, local) as it, it.http() as http:
        for name, fields, param, code in REFUSED:
            reply = await http.post(MESSAGES, json=body(**fields))
            said = reply.json()
            assert (said["type"], said["error"]["param"], said["error"]["code"]) == ("error", param, code), name
            assert reply.status_code == (404 if code == "model_not_found" else 400), name

    assert not local.inner.requests  # type: ignore[attr-defined]


async def test_what_the_guard_refuses_has_anthropics_shape_too(tmp_path: Path) -> None:
    """A foreign Origin, a wrong method, a wrong content type."""
    async with edge(tmp_path, ScriptedAnswer(*HERE[:2], LAST)) as it, it.http() as http:
        foreign = await http.post(MESSAGES, json=body(), headers={"origin": "https://evil.example"})
        method = await http.get(MESSAGES)
        kind = await http.post(MESSAGES, content=b"{}", headers={"content-type": "text/plain"})

    assert [reply.json()["error"]["type"] for reply in (foreign, method, kind)] == [
        "permission_error",
        "invalid_request_error",
        "invalid_request_error",
    ]
    assert [reply.status_code for reply in (foreign, method, kind)] == [403, 405, 415]
