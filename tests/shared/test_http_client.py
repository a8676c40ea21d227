"""The official `openai` client against the surface, unchanged: what it asks, what it gets, what it raises."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import openai
import pytest
from fakes import EchoAnswer, ScriptedAnswer
from prometheus_client import CollectorRegistry
from serving import served

from shared.errors import (
    ContextTooLong,
    Forbidden,
    Overloaded,
    RateLimited,
    RequestConflict,
    Unauthorized,
    UnknownModel,
    UpstreamFailed,
)
from shared.guard import Guard
from shared.http import create_app
from shared.schemas import Answer, Delta, ModelCard, ToolPiece, Usage

HELLO = [{"role": "user", "content": "one two three four"}]


@asynccontextmanager
async def client(answer: Answer) -> AsyncIterator[openai.AsyncOpenAI]:
    def answer_for(_: Mapping[str, str]) -> Answer:
        return answer

    app = create_app(
        answer_for=answer_for,
        models=lambda: [ModelCard(id="auto", context_length=2048)],
        health=lambda: {"status": "ok"},
        registry=CollectorRegistry(),
        source="edge",
        guard=Guard(),
    )
    async with (
        served(app) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as made,
    ):
        yield made


async def test_a_whole_answer() -> None:
    """Content, finish reason, usage and the route are where the client looks for them."""
    async with client(EchoAnswer()) as api:
        reply = await api.chat.completions.create(model="auto", messages=HELLO, max_tokens=3, user="u")

    assert reply.choices[0].message.content == "one two three "
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (4, 3, 7)
    assert reply.model_extra == {"causeway": {"route": "edge", "reason": "requested", "failovers": 0, "model": "echo"}}


async def test_a_stream_with_usage() -> None:
    """Deltas in order, one finish reason, then one chunk with the usage."""
    async with client(EchoAnswer()) as api:
        stream = await api.chat.completions.create(
            model="auto", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]

    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one two three four "
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert [c.usage.completion_tokens for c in chunks if c.usage] == [4]
    assert chunks[-1].choices == []


async def test_the_parsing_helper_of_the_client_works() -> None:
    """`chat.completions.stream` folds our chunks into the same message as without streaming."""
    async with client(EchoAnswer()) as api, api.chat.completions.stream(model="auto", messages=HELLO) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "one two three four "
    assert final.choices[0].message.role == "assistant"


@pytest.mark.parametrize("stream", [True, False])
async def test_n_choices(stream: bool) -> None:
    """Each choice is complete and told apart by its index."""
    texts = ["", "", ""]
    async with client(EchoAnswer()) as api:
        if stream:
            async for chunk in await api.chat.completions.create(model="auto", messages=HELLO, n=3, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        else:
            reply = await api.chat.completions.create(model="auto", messages=HELLO, n=3)
            for choice in reply.choices:
                texts[choice.index] += choice.message.content or ""
    assert texts == ["one two three four "] * 3


async def test_every_sampling_field_arrives() -> None:
    """What the client's arguments say is what the Answer gets."""
    echo = EchoAnswer()
    async with client(echo) as api:
        await api.chat.completions.create(
            model="auto",
            messages=HELLO,
            temperature=0.5,
            top_p=0.25,
            seed=11,
            stop=["A", "B"],
            max_completion_tokens=2,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            extra_body={"top_k": 7, "causeway": {"label": "edge_only"}},
        )
    (request,) = echo.requests
    got = request.sampling
    assert (got.temperature, got.top_p, got.seed, got.stop, got.max_tokens) == (0.5, 0.25, 11, ("A", "B"), 2)
    assert (got.presence_penalty, got.frequency_penalty, got.top_k, request.label) == (0.5, -0.5, 7, "edge_only")


async def test_logprobs_in_both_forms() -> None:
    """Chat's nested form, streamed and whole, and the completions' lists."""
    async with client(EchoAnswer()) as api:
        whole = await api.chat.completions.create(model="auto", messages=HELLO, logprobs=True, top_logprobs=2)
        stream = await api.chat.completions.create(
            model="auto", messages=HELLO, logprobs=True, top_logprobs=2, stream=True
        )
        streamed = [
            token
            async for chunk in stream
            for choice in chunk.choices
            if choice.logprobs
            for token in choice.logprobs.content or []
        ]
        text = await api.completions.create(model="auto", prompt="one two", logprobs=1)

    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content == streamed
    assert [token.token for token in streamed] == ["one ", "two ", "three ", "four "]
    assert len(streamed[0].top_logprobs) == 2
    assert text.choices[0].logprobs is not None
    assert text.choices[0].logprobs.text_offset == [0, 4]


async def test_completions_and_models() -> None:
    """The legacy endpoint, streaming too, and the list of models."""
    async with client(EchoAnswer()) as api:
        text = await api.completions.create(model="auto", prompt="one two", max_tokens=1)
        stream = await api.completions.create(model="auto", prompt="one two", stream=True)
        streamed = "".join([chunk.choices[0].text async for chunk in stream])
        names = [model.id async for model in await api.models.list()]
        one = await api.models.retrieve("auto")

    assert (text.choices[0].text, text.choices[0].finish_reason) == ("one ", "length")
    assert streamed == "one two "
    assert (names, one.id) == (["auto"], "auto")


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ContextTooLong("long", param="messages"), openai.BadRequestError),
        (Unauthorized("key"), openai.AuthenticationError),
        (Forbidden("no"), openai.PermissionDeniedError),
        (UnknownModel("none", param="model"), openai.NotFoundError),
        (RequestConflict("twice"), openai.ConflictError),
        (RateLimited("slow", retry_after=1), openai.RateLimitError),
        (Overloaded("full"), openai.InternalServerError),
        (UpstreamFailed("broke"), openai.InternalServerError),
    ],
    ids=lambda value: getattr(value, "code", None),
)
@pytest.mark.parametrize("stream", [True, False])
async def test_errors_are_the_clients_exceptions(error: Exception, raised: type[Exception], stream: bool) -> None:
    """Each status becomes the exception its users already catch, with our code and field."""
    async with client(ScriptedAnswer(error)) as api:
        with pytest.raises(openai.APIStatusError) as caught:
            await api.chat.completions.create(model="auto", messages=HELLO, stream=stream)
    assert type(caught.value) is raised
    assert (caught.value.code, caught.value.param) == (error.code, error.param)  # type: ignore[attr-defined]


async def test_an_error_in_mid_stream_is_raised() -> None:
    """After the first token the client's loop ends with APIError, not as if the answer were complete."""
    texts = []
    async with client(ScriptedAnswer(Delta(text="one", tokens=1), UpstreamFailed("it broke"))) as api:
        with pytest.raises(openai.APIError, match="it broke"):
            async for chunk in await api.chat.completions.create(model="auto", messages=HELLO, stream=True):
                texts.append(chunk.choices[0].delta.content)  # noqa: PERF401 - what came before the error counts
    assert texts == ["", "one"]


CALLING = (
    Delta(text="Let me see.", tokens=3),
    Delta(tokens=1, tool_calls=(ToolPiece(0, "", "call_a", "get_weather"),)),
    Delta(
        tokens=2, tool_calls=(ToolPiece(0, '{"city": '), ToolPiece(0, '"Oslo"}'), ToolPiece(1, "{}", "call_b", "now"))
    ),
    Delta(finish_reason="tool_calls", usage=Usage(prompt_tokens=9, completion_tokens=6)),
)
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now", "description": "The time.", "strict": True}},
]


async def test_calls_of_tools() -> None:
    """Streamed through the client's own accumulator or whole: names, arguments, ids and the reason are the same."""
    answer = ScriptedAnswer(*CALLING)
    async with client(answer) as api:
        whole = await api.chat.completions.create(model="auto", messages=HELLO, tools=TOOLS)
        async with api.chat.completions.stream(model="auto", messages=HELLO, tools=TOOLS, tool_choice="auto") as stream:
            streamed = await stream.get_final_completion()
    for reply in (whole, streamed):
        message = reply.choices[0].message
        assert reply.choices[0].finish_reason == "tool_calls"
        assert message.content == "Let me see."
        assert [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()] == [
            ("call_a", "get_weather", '{"city": "Oslo"}'),
            ("call_b", "now", "{}"),
        ]
    assert [tool.name for tool in answer.requests[0].tools] == ["get_weather", "now"]
    assert answer.requests[0].tools[1].strict


async def test_a_conversation_with_calls_goes_back_in() -> None:
    """What the client got is what it may send on: the assistant's calls and the tools' answers."""
    answer = ScriptedAnswer(*CALLING)
    async with client(answer) as api:
        reply = await api.chat.completions.create(model="auto", messages=HELLO, tools=TOOLS)
        result = {"role": "tool", "tool_call_id": "call_a", "content": "snow"}
        turns = [*HELLO, reply.choices[0].message.model_dump(exclude_none=True), result]
        choice = {"type": "function", "function": {"name": "now"}}
        await api.chat.completions.create(model="auto", messages=turns, tools=TOOLS, tool_choice=choice)
    asked = answer.requests[1]
    assert [call.name for call in asked.messages[1].tool_calls] == ["get_weather", "now"]
    assert asked.messages[2].tool_call_id == "call_a"
    assert (asked.tool_choice, asked.allowed_tools) == ("required", ("now",))
    assert [tool.name for tool in asked.calling] == ["now"]


async def test_unsupported_fields_are_refused_by_name() -> None:
    """The old way to offer functions is not silently ignored."""
    async with client(EchoAnswer()) as api:
        with pytest.raises(openai.BadRequestError) as caught:
            await api.chat.completions.create(model="auto", messages=HELLO, functions=[{"name": "f"}])
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "functions")
