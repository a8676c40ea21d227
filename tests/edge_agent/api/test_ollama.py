"""The Ollama surface over scripted sides: what the official client gets, what reaches a side, what is refused."""

import asyncio
import json
from pathlib import Path
from typing import Any

import ollama
import pytest
from edge_apps import TOOL, edge
from edge_sides import HERE, Local
from fakes import EchoAnswer, ScriptedAnswer
from waiting import HANG_S

from shared.embeddings import EmbeddingRequest, Embeddings
from shared.errors import Overloaded, UpstreamFailed
from shared.schemas import Delta, ModelCard, ToolPiece, Usage

CHAT, GENERATE = "/api/chat", "/api/generate"
HELLO: list[Any] = [{"role": "user", "content": "Hello there my friend"}]
TOOLS: list[Any] = [{"type": "function", "function": TOOL}]
USAGE = Usage(prompt_tokens=9, completion_tokens=4)
CALLS = (
    Delta(text="Wait.", tokens=3),
    Delta(tool_calls=(ToolPiece(0, '{"city": ', "call_1", "weather"),), tokens=1),
    Delta(tool_calls=(ToolPiece(0, '"Rome"}'),), tokens=1),
    Delta(tool_calls=(ToolPiece(1, "{}", "call_2", "weather"),), tokens=1),
    Delta(finish_reason="tool_calls", usage=USAGE),
)


def official(url: str) -> ollama.AsyncClient:
    return ollama.AsyncClient(host=url)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": HELLO} | fields


@pytest.mark.parametrize("target", ["edge", "cloud"])
async def test_the_official_client_reads_whole_and_streamed_replies(tmp_path: Path, target: str) -> None:
    """Chat and generate, in one piece and as lines: text, reason, counts, durations, route, on either route."""
    async with edge(tmp_path, EchoAnswer("edge"), EchoAnswer("cloud")) as it, official(it.url) as client:
        whole = await client.chat(target, HELLO)
        parts = [part async for part in await client.chat(target, HELLO, stream=True, options={"num_predict": 2})]
        text = await client.generate(target, "one two three", system="Be brief.")
        texts = [part async for part in await client.generate(target, "one two", stream=True)]

    assert whole.message.content is not None
    assert whole.message.content.split() == HELLO[0]["content"].split()
    assert (whole.model, whole.done, whole.done_reason) == (target, True, "stop")
    assert (whole.prompt_eval_count, whole.eval_count) == (4, 4)
    assert whole.total_duration is not None
    assert whole.total_duration >= (whole.prompt_eval_duration or 0) + (whole.eval_duration or 0) > 0
    assert [part.message.content for part in parts] == ["Hello ", "there ", ""]
    assert [part.done for part in parts] == [False, False, True]
    assert (parts[-1].done_reason, parts[-1].eval_count) == ("length", 2)
    assert text.response is not None
    assert text.response.split() == ["one", "two", "three"]
    assert "".join(part.response or "" for part in texts).split() == ["one", "two"]


async def test_lines_are_ndjson_and_say_the_route(tmp_path: Path) -> None:
    """Streamed unless told otherwise; the last line has the route, as the headers do."""
    async with edge(tmp_path, EchoAnswer()) as it, it.http() as http:
        lines = await http.post(CHAT, json=body())
        whole = await http.post(CHAT, json=body(stream=False))

    said = [json.loads(line) for line in lines.text.splitlines()]
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert lines.headers["x-causeway-route"] == whole.headers["x-causeway-route"] == "edge"
    assert said[-1]["causeway"]["route"] == whole.json()["causeway"]["route"] == "edge"
    assert all(one["created_at"].endswith("Z") for one in said)


async def test_calls_are_said_whole(tmp_path: Path) -> None:
    """Each call once, with its arguments as an object, streamed or not."""
    async with edge(tmp_path, ScriptedAnswer(*CALLS)) as it, official(it.url) as client:
        whole = await client.chat("edge", HELLO, tools=TOOLS)
        parts = [part async for part in await client.chat("edge", HELLO, tools=TOOLS, stream=True)]

    streamed = [call for part in parts for call in part.message.tool_calls or ()]
    for calls in (whole.message.tool_calls or (), streamed):
        assert [(call.function.name, call.function.arguments) for call in calls] == [
            ("weather", {"city": "Rome"}),
            ("weather", {}),
        ]
    assert whole.done_reason == "stop"


async def test_a_call_that_the_limit_cut_is_not_said_as_one(tmp_path: Path) -> None:
    """Half of the arguments are no object: the reason says that the answer was cut."""
    side = ScriptedAnswer(*CALLS[:2], Delta(finish_reason="length", usage=USAGE))
    async with edge(tmp_path, side) as it, it.http() as http:
        whole = (await http.post(CHAT, json=body(tools=TOOLS, stream=False))).json()
        lines = (await http.post(CHAT, json=body(tools=TOOLS))).text

    assert "tool_calls" not in whole["message"]
    assert whole["done_reason"] == "length"
    assert "tool_calls" not in lines


async def test_a_call_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    """A client of Ollama takes objects only: what the model wrote otherwise is said to be its fault."""
    side = ScriptedAnswer(
        Delta(tool_calls=(ToolPiece(0, "{'a'", "c", "weather"),), tokens=1),
        Delta(finish_reason="tool_calls", usage=USAGE),
    )
    async with edge(tmp_path, side) as it, it.http() as http:
        reply = await http.post(CHAT, json=body(tools=TOOLS, stream=False))

    assert (reply.status_code, reply.json()["code"]) == (502, "upstream_failed")


async def test_options_messages_and_format_reach_the_side(tmp_path: Path) -> None:
    """Every option that changes an answer; calls and their results are matched; a schema is the grammar."""
    echo = EchoAnswer()
    turns: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "weather", "arguments": {"city": "Rome"}}},
            {"function": {"name": "time", "arguments": {}}}]},
        {"role": "tool", "content": "noon", "tool_name": "time"},
        {"role": "tool", "content": "sun"},
    ]  # fmt: skip
    options = {
        "temperature": 0.5, "top_p": 0.7, "top_k": 7, "min_p": 0.1, "seed": 3, "num_predict": 9, "stop": ["zebra"],
        "repeat_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.4, "num_ctx": 4096, "num_gpu": 99,
    }  # fmt: skip
    async with edge(tmp_path, echo) as it, official(it.url) as client:
        await client.chat("edge", turns, options=options, format={"type": "object"}, keep_alive="5m", think=False)
        await client.chat("edge", HELLO, options={}, logprobs=True, top_logprobs=2)

    seen, plain = echo.requests
    sampling = seen.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.7, 7, 0.1)
    assert (sampling.seed, sampling.max_tokens, sampling.stop) == (3, 9, ("zebra",))
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.2, 0.3, 0.4)
    assert seen.grammar is not None
    assert seen.grammar.text == '{"type":"object"}'
    calls = seen.messages[1].tool_calls
    assert [one.tool_call_id for one in seen.messages[2:]] == [calls[1].id, calls[0].id]
    assert (plain.sampling.temperature, plain.sampling.top_k, plain.sampling.top_p) == (0.8, 40, 0.9)
    assert (plain.sampling.max_tokens, plain.sampling.logprobs, plain.grammar) == (None, 2, None)


async def test_logprobs_have_ollamas_form(tmp_path: Path) -> None:
    """One entry a token with its rivals, streamed and whole."""
    async with edge(tmp_path, EchoAnswer()) as it, official(it.url) as client:
        whole = await client.chat("edge", HELLO, logprobs=True, top_logprobs=2)
        parts = [part async for part in await client.chat("edge", HELLO, logprobs=True, top_logprobs=2, stream=True)]

    for found in (whole.logprobs or (), [one for part in parts for one in part.logprobs or ()]):
        assert [one.token for one in found] == ["Hello ", "there ", "my ", "friend "]
        assert all(one.logprob == -0.5 and len(one.top_logprobs or ()) == 2 for one in found)


async def test_a_raw_prompt_goes_in_as_it_is(tmp_path: Path) -> None:
    """Without a template; any other prompt is what the user says, after the system's words."""
    echo = EchoAnswer()
    async with edge(tmp_path, echo) as it, official(it.url) as client:
        await client.generate("edge", "one two", raw=True)
        await client.generate("edge", "one two", system="Be brief.")

    raw, plain = echo.requests
    assert (raw.prompt, raw.messages) == ("one two", ())
    assert [(one.role, one.content) for one in plain.messages] == [("system", "Be brief."), ("user", "one two")]


async def test_who_asks_nothing_learns_that_the_model_is_there(tmp_path: Path) -> None:
    """Clients load a model by an empty request: no side is asked; an unknown model is a 404."""
    local, cloud = Local(EchoAnswer()), EchoAnswer("cloud")
    async with edge(tmp_path, local, cloud) as it, it.http() as http:
        loads = [
            await http.post(GENERATE, json={"model": "large"}),
            await http.post(CHAT, json={"model": "large", "messages": []}),
            await http.post(GENERATE, json={"model": "large", "keep_alive": 0}),
        ]
        unknown = await http.post(GENERATE, json={"model": "zap"})

    assert [reply.json()["done_reason"] for reply in loads] == ["load", "load", "unload"]
    assert (unknown.status_code, unknown.json()["error"]) == (404, "no such model")
    assert not cloud.requests
    assert not local.inner.requests  # type: ignore[attr-defined]


async def test_errors_are_ollamas_with_their_status(tmp_path: Path) -> None:
    """Before the first token by status, after it as a line; the official client raises both."""
    busy, broken = ScriptedAnswer(Overloaded("busy", retry_after=2)), ScriptedAnswer(HERE[0], UpstreamFailed("it died"))
    async with edge(tmp_path, busy) as it, official(it.url) as client, it.http() as http:
        with pytest.raises(ollama.ResponseError, match="busy") as raised:
            await client.chat("edge", HELLO)
        reply = await http.post(CHAT, json=body())
    async with edge(tmp_path, broken) as it, official(it.url) as client:
        with pytest.raises(ollama.ResponseError, match="it died"):
            async for _ in await client.chat("edge", HELLO, stream=True):
                pass

    assert raised.value.status_code == 503
    assert reply.headers["retry-after"] == "2"
    assert reply.json()["retryable"] is True


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_is_not_computed_for(tmp_path: Path, stream: bool) -> None:
    """Streamed or not, a client that closes its connection ends its answer."""
    side = ScriptedAnswer(HERE[0], asyncio.Event())
    async with edge(tmp_path, side) as it, it.http() as http:
        asking = asyncio.create_task(http.post(CHAT, json=body(stream=stream)))
        await asyncio.wait_for(side.begun.wait(), HANG_S)
        asking.cancel()
        await asyncio.wait_for(side.idle(), HANG_S)

    assert len(side.closed) == 1


async def test_what_clients_look_at_first(tmp_path: Path) -> None:
    """The root says that somebody is there, to GET and HEAD; the version is ours."""
    async with edge(tmp_path, EchoAnswer()) as it, it.http() as http:
        root, head = await http.get("/"), await http.head("/")
        told = await http.get("/api/version")

    assert (root.status_code, head.status_code) == (200, 200)
    assert "running" in root.text
    assert told.json()["version"].count(".") == 2


class Embedder:
    def __init__(self) -> None:
        self.asked: list[EmbeddingRequest] = []

    async def __call__(self, request: EmbeddingRequest) -> Embeddings:
        self.asked.append(request)
        return Embeddings(vectors=tuple((float(at), 1.0) for at, _ in enumerate(request.inputs)), prompt_tokens=5)

    def model_card(self) -> ModelCard:
        return ModelCard(id="mini", context_length=256)


async def test_embeddings_in_both_forms(tmp_path: Path) -> None:
    """Several texts, or the older single prompt; without a model for it, a 404 says so."""
    embedder = Embedder()
    async with edge(tmp_path, EchoAnswer(), embedder=embedder) as it, official(it.url) as client:
        several = await client.embed("mini", ["a", "b"], dimensions=2)
        one = await client.embed("mini", "a")
        old = await client.embeddings("mini", "a")
    async with edge(tmp_path, EchoAnswer()) as it, official(it.url) as client:
        with pytest.raises(ollama.ResponseError, match="embeddings") as raised:
            await client.embed("mini", "a")

    assert (several.embeddings, several.prompt_eval_count) == ([[0.0, 1.0], [1.0, 1.0]], 5)
    assert (one.embeddings, old.embedding) == ([[0.0, 1.0]], [0.0, 1.0])
    assert [(one.inputs, one.dimensions) for one in embedder.asked] == [(("a", "b"), 2), (("a",), None), (("a",), None)]
    assert raised.value.status_code == 404


@pytest.mark.parametrize("path", ["create", "copy", "push", "delete", "blobs/sha256:29fdb92e57cf0827"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD"])
async def test_no_model_comes_or_goes_by_an_upload(tmp_path: Path, path: str, method: str) -> None:
    """S-11: what would create, copy, push, upload or delete a model is refused, in Ollama's words."""
    async with edge(tmp_path, EchoAnswer()) as it, it.http() as http:
        reply = await http.request(method, f"/api/{path}", content=b"{}")

    assert reply.status_code == 404
    if method != "HEAD":
        assert "HTTP" in reply.json()["error"]


def options(**fields: Any) -> dict[str, Any]:
    return {"options": fields}


REFUSED: list[tuple[str, str, dict[str, Any], str, str]] = [
    ("images", CHAT, {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages[0].images",
     "unsupported_parameter"),
    ("role", CHAT, {"messages": [{"role": "root", "content": "x"}]}, "messages[0].role", "bad_request"),
    ("unknown in message", CHAT, {"messages": [{"role": "user", "content": "x", "zap": 1}]}, "messages[0].zap",
     "bad_request"),
    ("think", CHAT, {"think": True}, "think", "unsupported_parameter"),
    ("think hard", CHAT, {"think": "high"}, "think", "unsupported_parameter"),
    ("format", CHAT, {"format": "xml"}, "format", "bad_request"),
    ("schema", CHAT, {"format": {"type": "zap"}}, "format", "bad_request"),
    ("unknown option", CHAT, options(zap=1), "options.zap", "bad_request"),
    ("mirostat", CHAT, options(mirostat=2), "options.mirostat", "unsupported_parameter"),
    ("tfs_z", CHAT, options(tfs_z=0.5), "options.tfs_z", "unsupported_parameter"),
    ("temperature", CHAT, options(temperature=9), "options.temperature", "bad_request"),
    ("temperature a bool", CHAT, options(temperature=True), "options.temperature", "bad_request"),
    ("temperature a string", CHAT, options(temperature="1"), "options.temperature", "bad_request"),
    ("seed 2^63", CHAT, options(seed=1 << 63), "options.seed", "bad_request"),
    ("num_predict 0", CHAT, options(num_predict=0), "options.num_predict", "bad_request"),
    ("num_predict -3", CHAT, options(num_predict=-3), "options.num_predict", "bad_request"),
    ("top_k -1", CHAT, options(top_k=-1), "options.top_k", "bad_request"),
    ("repeat_penalty 0", CHAT, options(repeat_penalty=0), "options.repeat_penalty", "bad_request"),
    ("17 stops", CHAT, options(stop=["x"] * 17), "options.stop", "bad_request"),
    ("top_logprobs alone", CHAT, {"top_logprobs": 2}, "top_logprobs", "bad_request"),
    ("tool", CHAT, {"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools[0].type", "unsupported_parameter"),
    ("unknown", CHAT, {"zap": 1}, "zap", "bad_request"),
    ("unknown model", CHAT, {"model": "zap"}, "model", "model_not_found"),
    ("no model", CHAT, {"model": None}, "model", "bad_request"),
    ("suffix", GENERATE, {"suffix": "x"}, "suffix", "unsupported_parameter"),
    ("template", GENERATE, {"template": "{{ .Prompt }}"}, "template", "unsupported_parameter"),
    ("context", GENERATE, {"context": [1, 2]}, "context", "unsupported_parameter"),
    ("images", GENERATE, {"images": ["aGk="]}, "images", "unsupported_parameter"),
    ("raw and system", GENERATE, {"raw": True, "system": "x"}, "system", "bad_request"),
    ("deadline", GENERATE, {"causeway": {"deadline_s": -1}}, "causeway.deadline_s", "bad_request"),
]  # fmt: skip


async def test_bad_bodies_are_refused_by_name(tmp_path: Path) -> None:
    """S-18: each body of the table gets its field and code, the error is a text, and no side is asked."""
    local = Local(EchoAnswer())
    async with edge(tmp_path, local) as it, it.http() as http:
        for name, path, fields, param, code in REFUSED:
            good = body() if path == CHAT else {"model": "auto", "prompt": "hi"}
            reply = await http.post(path, json=good | fields)
            said = reply.json()
            assert (said["param"], said["code"]) == (param, code), name
            assert reply.status_code == (404 if code == "model_not_found" else 400), name
            assert isinstance(said["error"], str), name

    assert not local.inner.requests  # type: ignore[attr-defined]
