"""Tools through the whole engine: the prompt, the grammar of a call, calls in the stream."""

import json

import pytest
import tiny_llama
from tiny_serving import collect, request, serving_tiny

from cloud_engine.model.tokenizer import Tokenizer
from shared.errors import BadRequest
from shared.schemas import Message, Sampling, Tool, ToolCall

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = Tool(name="get_weather", description="Of a city.", parameters=json.dumps(SCHEMA))
NOW = Tool(name="now", parameters='{"type":"object","properties":{},"additionalProperties":false}')
HELLO = (Message(role="user", content="hi"),)
HOT = Sampling(temperature=1.5, max_tokens=110)


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory):
    """Tools make long prompts of bytes."""
    return tiny_llama.save(tmp_path_factory.mktemp("roomy"), max_position_embeddings=1024)


def asked(**values):
    return request(prompt=None, messages=HELLO, **({"sampling": HOT, "tools": (WEATHER, NOW)} | values))


def calls_of(deltas) -> list[tuple[str, dict]]:
    calls: dict[int, list[str]] = {}
    for piece in (piece for delta in deltas for piece in delta.tool_calls):
        if piece.id is not None:
            calls[piece.index] = [piece.name, ""]
        calls[piece.index][1] += piece.arguments
    return [(name, json.loads(arguments)) for name, arguments in calls.values()]


@pytest.mark.parametrize("seed", range(3))
async def test_a_named_tool_is_called_as_its_schema_says(roomy_model, seed):
    """A model of random weights, made to call: one call, of that tool, with arguments that fit; no text."""
    sampling = Sampling(temperature=1.5, seed=seed, max_tokens=200)
    one = asked(sampling=sampling, tool_choice="required", allowed_tools=("get_weather",), parallel_tool_calls=False)
    async with serving_tiny(roomy_model, model_len=800, num_blocks=120) as answer:
        deltas = await collect(answer, one)
    [(name, arguments)] = calls_of(deltas)
    assert name == "get_weather"
    assert set(arguments) == {"city", "days"}
    assert arguments["days"] in (1, 2)
    assert deltas[-1].finish_reason == "tool_calls"
    assert not "".join(delta.text for delta in deltas).strip()


async def test_a_required_call_may_be_of_any_tool(roomy_model):
    """Whatever is drawn, it is a call of an offered tool, or was cut by `max_tokens`."""
    async with serving_tiny(roomy_model, model_len=800, num_blocks=120) as answer:
        deltas = await collect(answer, asked(tool_choice="required", sampling=Sampling(seed=5, max_tokens=150)))
    pieces = [piece for delta in deltas for piece in delta.tool_calls]
    assert {piece.name for piece in pieces if piece.name} <= {"get_weather", "now"}
    assert pieces
    assert "<tool_call>" not in "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("choice", ["auto", "none"])
async def test_a_free_answer_stays_free(roomy_model, choice):
    """Without a requirement nothing is forced: the text of random weights is text, and ends as text."""
    async with serving_tiny(roomy_model, model_len=800, num_blocks=120) as answer:
        deltas = await collect(answer, asked(tool_choice=choice, sampling=Sampling(seed=1, max_tokens=20)))
    assert not calls_of(deltas)
    assert deltas[-1].finish_reason in ("stop", "length")


async def test_a_strict_tool_that_cannot_be_compiled_is_refused(roomy_model):
    """S-41: a schema that the library does not know in full is a BadRequest naming the tools; the engine goes on."""
    odd = Tool(name="odd", parameters='{"type":"array","contains":{"type":"null"}}', strict=True)
    async with serving_tiny(roomy_model, model_len=800, num_blocks=120) as answer:
        with pytest.raises(BadRequest) as refused:
            await collect(answer, asked(tools=(odd,)))
        assert refused.value.param == "tools"
        assert answer.failure is None


def test_tools_and_calls_are_in_the_prompt(tiny_model):
    """A template without a place for tools is given them in words, and past calls as the model would write them."""
    tokenizer = Tokenizer(tiny_model)
    turns = (
        *HELLO,
        Message(role="assistant", content="", tool_calls=(ToolCall(id="a", name="now", arguments="{}"),)),
        Message(role="tool", content="noon", tool_call_id="a"),
    )
    text = tiny_llama.tokenizer().decode(tokenizer.encode_chat(turns, (WEATHER,)))
    assert "get_weather" in text
    assert '"maxLength": 6' in text.replace('"maxLength":6', '"maxLength": 6')
    assert '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>' in text
    assert "noon" in text


def test_a_template_that_knows_tools_is_given_them(tiny_model):
    """Then nothing is added in words: tools and calls are values that the template writes."""
    tokenizer = Tokenizer(tiny_model)
    template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
        "{% for m in messages %}({{ m.role }} {{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}:{{ c.function.arguments.x }}{% endfor %}){% endfor %}"
    )
    tokenizer._inner.chat_template = tokenizer._template = template
    calls = (ToolCall(id="a", name="now", arguments='{"x": 7}'),)
    turns = (*HELLO, Message(role="assistant", content="", tool_calls=calls))
    text = tiny_llama.tokenizer().decode(tokenizer.encode_chat(turns, (WEATHER, NOW)))
    assert text == "[get_weather][now](user hi)(assistant now:7)"
