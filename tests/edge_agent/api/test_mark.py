"""A switched answer on every surface: clients show the mark, and a machine can tell whose part is whose."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
from cascade_parts import POLICY, UNSURE
from edge_apps import Edge, edge
from edge_sides import THERE
from fakes import ScriptedAnswer

from edge_agent.chat import converse
from edge_agent.screens import Plain
from router.cascade_rules import MARK

AT_ONCE = POLICY.replace("threshold: 0.6", "threshold: 0.6, hold: none")
BETWEEN = f"\n\n{MARK}\n\n"
SWITCHED = f"It is {BETWEEN}from there"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@asynccontextmanager
async def switching(folder: Path, cloud: ScriptedAnswer | None = None) -> AsyncIterator[Edge]:
    async with edge(folder, ScriptedAnswer(*UNSURE), cloud or ScriptedAnswer(*THERE), policy=AT_ONCE) as it:
        yield it


def check(causeway: dict[str, Any], text: str) -> None:
    """Who answers, whose the beginning was, and where the answer's own text starts."""
    above = causeway["switched"]
    assert (causeway["route"], causeway["model"], above["from"], above["model"]) == ("cloud", "large", "edge", "small")
    assert text[above["starts_at"] :] == "from there"
    assert (above["usage"]["prompt_tokens"], above["usage"]["completion_tokens"]) == (5, 2)


async def test_openai_chat(tmp_path: Path) -> None:
    """The chunk of the mark and the last one have `causeway`; the usage is of both."""
    async with (
        switching(tmp_path) as it,
        openai.AsyncOpenAI(base_url=f"{it.url}/v1", api_key="any", max_retries=0, timeout=60) as client,
    ):
        stream = await client.chat.completions.create(
            model="auto", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]

    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == SWITCHED
    told = [(chunk.choices[0].delta.content, chunk.model_extra) for chunk in chunks if "causeway" in chunk.to_dict()]
    assert [content for content, _ in told] == [BETWEEN, None]
    for _, extra in told:
        check((extra or {})["causeway"], text)
    assert choices[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (8, 4)


async def test_openai_responses(tmp_path: Path) -> None:
    """Two messages: the edge's, incomplete, and the cloud's, which begins with the mark. A next turn is told the
    cloud's alone."""
    cloud = ScriptedAnswer(*THERE)
    async with (
        switching(tmp_path, cloud) as it,
        openai.AsyncOpenAI(base_url=f"{it.url}/v1", api_key="any", max_retries=0, timeout=60) as client,
    ):
        events = [event async for event in await client.responses.create(model="auto", input="Hello", stream=True)]
        response = events[-1].response  # type: ignore[union-attr]
        await client.responses.create(model="cloud", input="And then?", previous_response_id=response.id)

    assert response.output_text == SWITCHED
    assert [(item.type, getattr(item, "status", "")) for item in response.output] == [
        ("message", "incomplete"),
        ("message", "completed"),
    ]
    (mark,) = [event for event in events if (event.model_extra or {}).get("causeway")]
    assert (mark.type, getattr(mark, "delta", "")) == ("response.output_text.delta", BETWEEN)
    check((response.model_extra or {})["causeway"], SWITCHED)
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (8, 4)
    assert [message.content for message in cloud.requests[-1].messages] == ["Hello", "from there", "And then?"]


async def test_anthropic_messages(tmp_path: Path) -> None:
    """A block for each side; the mark begins the second."""
    async with (
        switching(tmp_path) as it,
        anthropic.AsyncAnthropic(base_url=it.url, api_key="any", max_retries=0, timeout=60) as client,
    ):
        async with client.messages.stream(model="auto", max_tokens=9, messages=HELLO) as stream:
            message = await stream.get_final_message()
        raw = await client.messages.create(model="auto", max_tokens=9, messages=HELLO, stream=True)
        events = [event async for event in raw]

    assert [block.text for block in message.content] == ["It is ", f"{BETWEEN}from there"]  # type: ignore[union-attr]
    (mark,) = [event for event in events if event.type == "content_block_delta" and "causeway" in event.to_dict()]
    assert mark.index == 1
    check((mark.model_extra or {})["causeway"], SWITCHED)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (8, 4)


async def test_ollama_chat(tmp_path: Path) -> None:
    """The line of the mark has `causeway`, and so has the last."""
    async with switching(tmp_path) as it, it.http() as http, ollama.AsyncClient(host=it.url) as client:
        parts = [part async for part in await client.chat("auto", HELLO, stream=True)]
        reply = await http.post("/api/chat", json={"model": "auto", "messages": HELLO})

    lines = [json.loads(line) for line in reply.text.splitlines()]

    assert "".join(part.message.content or "" for part in parts) == SWITCHED
    told = [line for line in lines if "causeway" in line]
    assert [(line["message"]["content"], line["done"]) for line in told] == [(BETWEEN, False), ("", True)]
    for line in told:
        check(line["causeway"], SWITCHED)
    assert (told[-1]["prompt_eval_count"], told[-1]["eval_count"]) == (8, 4)


@pytest.mark.parametrize("path", ["/v1/completions", "/api/generate"])
async def test_raw_text_is_never_marked(tmp_path: Path, path: str) -> None:
    """What continues a text, as an editor asks for, is one side's alone."""
    body = {"model": "auto", "prompt": "def f", "stream": True} | ({"raw": True} if path == "/api/generate" else {})
    async with switching(tmp_path) as it, it.http() as http:
        reply = await http.post(path, json=body)

    assert reply.status_code == 200
    assert reply.headers["x-causeway-route"] == "cloud"
    assert "It " not in reply.text


async def test_the_terminal(tmp_path: Path) -> None:
    """Both are shown, with the mark; the next question carries the cloud's answer alone; the note says whose it is."""
    local, cloud = ScriptedAnswer(*UNSURE), ScriptedAnswer(*THERE)
    out, aside, lines = io.StringIO(), io.StringIO(), iter(["one", "two"])

    def read() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    async with edge(tmp_path, local, cloud, policy=AT_ONCE) as it:
        screen = Plain(out, aside)
        failures = await asyncio.to_thread(converse, it.url, "auto", private=False, read=read, screen=screen)

    assert failures == 0
    assert out.getvalue() == f"{SWITCHED}\n" * 2
    assert aside.getvalue().startswith("[edge, then cloud: cascade: p 0.30 < 0.60 (uncalibrated)")
    assert [message.content for message in cloud.requests[-1].messages] == ["one", "from there", "two"]
