"""One suite, two paths: the official clients, unchanged, get the same fields and event types from the model on the
device as from the cloud's, through every surface of a real pair of daemons."""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import ollama
import openai
import pytest
from clients import metric, until

pytestmark = [pytest.mark.system, pytest.mark.model]

ROUTES = ("edge", "cloud")
HELLO: list[Any] = [{"role": "user", "content": "Say hello to the world."}]
COUNT = "One, two, three, four,"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"name": "weather", "description": "The weather in a city.", "parameters": SCHEMA}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}

Probe = Callable[[str, str], Any]
PROBES: dict[str, Probe] = {}


def probe(function: Probe) -> Probe:
    """What a client does over `url` with the model `route`; gives what it got, as plain data."""
    PROBES[function.__name__] = function
    return function


def fields(value: Any, path: str = "") -> Iterator[str]:
    """Every path of keys in it; the items of a list are one."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"{path}.{name}"
            yield from fields(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from fields(inner, f"{path}[]")


def of_openai(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120)


def of_anthropic(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=120)


def is_of_schema(text: str) -> None:
    assert json.loads(text)["city"] in ("Rome", "Paris")


@probe
def openai_whole_with_logprobs_n_and_seed(url: str, route: str) -> Any:
    with of_openai(url) as client:
        got = [
            client.chat.completions.create(
                model=route, messages=HELLO, max_tokens=8, temperature=0.7, seed=7, n=2, logprobs=True, top_logprobs=2
            )
            for _ in range(2)
        ]
    texts = [[choice.message.content for choice in one.choices] for one in got]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2
    tokens = got[0].choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)
    assert got[0].usage.completion_tokens > 0
    assert got[0].model_extra["causeway"]["route"] == route
    return got[0].to_dict()


@probe
def openai_streamed_with_usage(url: str, route: str) -> Any:
    with of_openai(url) as client:
        chunks = list(
            client.chat.completions.create(
                model=route, messages=HELLO, max_tokens=8, temperature=0, stream=True, logprobs=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
    assert chunks[-1].usage.completion_tokens > 0
    assert [one.choices[0].finish_reason for one in chunks if one.choices][-1] in ("stop", "length")
    return [one.to_dict() for one in chunks]


@probe
def openai_json_schema(url: str, route: str) -> Any:
    with of_openai(url) as client:
        got = client.chat.completions.create(
            model=route, messages=HELLO, max_tokens=32, temperature=0, response_format=FORMAT
        )
    is_of_schema(got.choices[0].message.content)
    return got.to_dict()


@probe
def openai_forced_call(url: str, route: str) -> Any:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    with of_openai(url) as client:
        got = client.chat.completions.create(
            model=route, messages=HELLO, max_tokens=64, temperature=0, tools=TOOLS, tool_choice=choice
        )
        chunks = list(
            client.chat.completions.create(
                model=route, messages=HELLO, max_tokens=64, temperature=0, tools=TOOLS, tool_choice=choice, stream=True
            )
        )
    (call,) = got.choices[0].message.tool_calls
    assert (got.choices[0].finish_reason, call.function.name) == ("tool_calls", "weather")
    is_of_schema(call.function.arguments)
    return [got.to_dict(), [one.to_dict() for one in chunks]]


@probe
def openai_completion_stopped(url: str, route: str) -> Any:
    with of_openai(url) as client:
        raw = client.completions.create(model=route, prompt=COUNT, max_tokens=8, temperature=0, logprobs=1)
        stop = raw.choices[0].text[2:5]
        got = client.completions.create(model=route, prompt=COUNT, max_tokens=8, temperature=0, stop=[stop])
    assert got.choices[0].finish_reason == "stop"
    assert stop not in got.choices[0].text
    return [raw.to_dict(), got.to_dict()]


@probe
def openai_errors(url: str, route: str) -> Any:
    with of_openai(url) as client:
        with pytest.raises(openai.BadRequestError) as warm:
            client.chat.completions.create(model=route, messages=HELLO, temperature=9)
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model=route, messages=[{"role": "user", "content": "word " * 30_000}])
    assert (warm.value.param, long.value.code) == ("temperature", "context_length_exceeded")
    return [warm.value.body, long.value.body]


@probe
def responses_whole_and_gone_on_from(url: str, route: str) -> Any:
    with of_openai(url) as client:
        one = client.responses.create(model=route, input="Say hello.", max_output_tokens=16, temperature=0)
        two = client.responses.create(
            model=route, input="Again.", max_output_tokens=16, temperature=0, previous_response_id=one.id,
            include=["message.output_text.logprobs"], top_logprobs=1,
        )  # fmt: skip
        again = client.responses.retrieve(two.id)
    assert one.output_text
    assert again.to_dict() == two.to_dict()
    assert two.usage.input_tokens > one.usage.input_tokens
    return [reply.to_dict() | {"incomplete_details": None, "completed_at": None} for reply in (one, two)]


@probe
def responses_streamed(url: str, route: str) -> Any:
    with of_openai(url) as client:
        events = list(client.responses.create(model=route, input="Hi", max_output_tokens=8, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type in ("response.completed", "response.incomplete")
    return {event.type: event.to_dict() for event in events[:-1]}


@probe
def responses_forced_call_and_schema(url: str, route: str) -> Any:
    text: Any = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}}
    choice: Any = {"type": "function", "name": "weather"}
    with of_openai(url) as client:
        called = client.responses.create(
            model=route, input="Hi", temperature=0, max_output_tokens=64, tools=[{"type": "function", **WEATHER}],
            tool_choice=choice,
        )  # fmt: skip
        shaped = client.responses.create(model=route, input="Hi", max_output_tokens=32, temperature=0, text=text)
    (call,) = [item for item in called.output if item.type == "function_call"]
    is_of_schema(call.arguments)
    is_of_schema(shaped.output_text)
    return [called.to_dict(), shaped.to_dict()]


@probe
def responses_over_websocket(url: str, route: str) -> Any:
    events = []
    with of_openai(url) as client, client.responses.connect() as connection:
        connection.response.create(model=route, input="Hi", max_output_tokens=8, temperature=0, store=False)
        for event in connection:
            events.append(event)
            if event.type in ("response.completed", "response.incomplete"):
                break
    assert events[0].type == "response.created"
    return {event.type: event.to_dict() for event in events[:-1]}


@probe
def anthropic_whole(url: str, route: str) -> Any:
    with of_anthropic(url) as client:
        got = client.messages.create(model=route, max_tokens=8, messages=HELLO, system="Be brief.")
        count = client.messages.count_tokens(model=route, messages=HELLO, system="Be brief.")
    assert got.content[0].text
    assert count.input_tokens > 0
    assert got.model_extra["causeway"]["route"] == route
    return got.to_dict()


@probe
def anthropic_stopped(url: str, route: str) -> Any:
    greedy: Any = {"temperature": 0}
    with of_anthropic(url) as client:
        free = client.messages.create(model=route, max_tokens=8, messages=HELLO, extra_body=greedy)
        stop = free.content[0].text[1:4]
        got = client.messages.create(
            model=route, max_tokens=8, messages=HELLO, stop_sequences=[stop], extra_body=greedy
        )
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", stop)
    return got.to_dict()


@probe
def anthropic_streamed(url: str, route: str) -> Any:
    with of_anthropic(url) as client:
        events = list(client.messages.create(model=route, max_tokens=8, messages=HELLO, stream=True))
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")
    return {event.type: event.to_dict() for event in events}


@probe
def anthropic_forced_call(url: str, route: str) -> Any:
    tools: list[Any] = [{"name": "weather", "description": "The weather.", "input_schema": SCHEMA}]
    choice: Any = {"type": "tool", "name": "weather"}
    with of_anthropic(url) as client:
        got = client.messages.create(model=route, max_tokens=64, messages=HELLO, tools=tools, tool_choice=choice)
        with client.messages.stream(
            model=route, max_tokens=64, messages=HELLO, tools=tools, tool_choice=choice
        ) as stream:
            streamed = stream.get_final_message()
    for message in (got, streamed):
        assert message.stop_reason == "tool_use"
        assert message.content[-1].input["city"] in ("Rome", "Paris")
    return got.to_dict()


@probe
def anthropic_errors(url: str, route: str) -> Any:
    with of_anthropic(url) as client:
        with pytest.raises(anthropic.BadRequestError) as warm:
            client.messages.create(model=route, max_tokens=8, messages=HELLO, extra_body={"temperature": 9})
        with pytest.raises(anthropic.BadRequestError) as long:
            client.messages.create(model=route, max_tokens=8, messages=[{"role": "user", "content": "word " * 30_000}])
    return [warm.value.body, long.value.body]


@probe
def ollama_whole_with_logprobs(url: str, route: str) -> Any:
    options = {"temperature": 0, "num_predict": 8, "seed": 3}
    with ollama.Client(host=url) as client:
        chat = client.chat(route, HELLO, options=options, logprobs=True, top_logprobs=2)
        text = client.generate(route, COUNT, raw=True, options=options | {"stop": ["zebra"]})
    assert chat.message.content
    assert text.response
    assert all(len(token.top_logprobs) == 2 for token in chat.logprobs)
    assert chat.eval_count > 0
    return [chat.model_dump(exclude_unset=True), text.model_dump(exclude_unset=True)]


@probe
def ollama_streamed(url: str, route: str) -> Any:
    with ollama.Client(host=url) as client:
        parts = list(client.chat(route, HELLO, options={"temperature": 0, "num_predict": 8}, stream=True))
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    return [part.model_dump(exclude_unset=True) for part in parts]


@probe
def ollama_schema(url: str, route: str) -> Any:
    with ollama.Client(host=url) as client:
        got = client.chat(route, HELLO, options={"temperature": 0, "num_predict": 32}, format=SCHEMA)
    is_of_schema(got.message.content)
    return got.model_dump(exclude_unset=True)


@probe
def ollama_errors(url: str, route: str) -> Any:
    with ollama.Client(host=url) as client:
        with pytest.raises(ollama.ResponseError) as warm:
            client.chat(route, HELLO, options={"temperature": 9})
        with pytest.raises(ollama.ResponseError) as long:
            client.chat(route, [{"role": "user", "content": "word " * 30_000}])
    assert (warm.value.status_code, long.value.status_code) == (400, 400)
    return [{warm.value.error.partition(" ")[0]: 1}, {long.value.error.partition(" ")[0]: 1}]


@pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")  # how one of the clients connects
@pytest.mark.parametrize("name", PROBES)
def test_both_paths_give_the_same_fields(pair: Any, name: str) -> None:
    """What one path's reply has, the other's has too: fields, event types, and the errors word for word."""
    replies = {route: PROBES[name](pair.edge.url, route) for route in ROUTES}

    assert set(fields(replies["edge"])) == set(fields(replies["cloud"]))
    assert set(fields(replies["edge"]))


STORY = "Tell a very long story about a river."
LONG: dict[str, dict[str, Any]] = {
    "/v1/messages": {"max_tokens": 1500, "messages": [{"role": "user", "content": STORY}]},
    "/v1/responses": {"max_output_tokens": 1500, "input": STORY},
    "/api/chat": {"messages": [{"role": "user", "content": STORY}], "options": {"num_predict": 1500}},
    "/api/generate": {"prompt": STORY, "options": {"num_predict": 1500}},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("path", LONG)
def test_who_leaves_in_the_middle_is_not_computed_for(pair: Any, path: str, route: str) -> None:
    """The client closes its connection after the first bytes: long before the end neither side computes for it."""
    name, url = ("edge", pair.edge.url) if route == "edge" else ("engine", pair.cloud.url)
    host, port = pair.edge.url.removeprefix("http://").split(":")
    data = json.dumps({"model": route, "stream": True, **LONG[path]}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        assert b" 200 " in connection.recv(4096)
        assert metric(url, f"causeway_{name}_running", pair.edge_key) > 0

    assert until(lambda: metric(url, f"causeway_{name}_running", pair.edge_key) == 0, 10)
