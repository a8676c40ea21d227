"""Grammars, forced calls, biases and ends on the device's own model: what the cloud does, by the same fields."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from fakes import text_of
from waiting import HANG_S

from edge_agent.backends.llama import LlamaBackend
from shared.errors import BadRequest
from shared.schemas import ChatRequest, Delta, Grammar, Message, Sampling, Tool

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = Tool(name="get_weather", description="Of a city.", parameters=json.dumps(CITY))
JSON = Grammar(syntax="json_schema", text=json.dumps(PERSON))
DATE = Grammar(syntax="regex", text="[0-9]{4}-[0-9]{2}-[0-9]{2}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(model_path: Path) -> AsyncIterator[LlamaBackend]:
    made = LlamaBackend(model_path, slots=4, context=512)
    try:
        await made.start()
        yield made
    finally:
        await made.aclose()


def ask(text: str = "Tell me about somebody, in JSON.", sampling: Sampling | None = None, **fields: Any) -> ChatRequest:
    sampling = sampling or Sampling(temperature=1.2, seed=1, max_tokens=80)
    return ChatRequest(
        id="r", model="edge", messages=(Message(role="user", content=text),), sampling=sampling, **fields
    )


async def answer(backend: LlamaBackend, request: ChatRequest) -> list[Delta]:
    async with asyncio.timeout(HANG_S):
        return [delta async for delta in backend.answer(request)]


def calls_of(deltas: list[Delta]) -> list[tuple[str, str]]:
    calls: dict[int, list[str]] = {}
    for piece in (piece for delta in deltas for piece in delta.tool_calls):
        if piece.name is not None:
            calls[piece.index] = [piece.name, ""]
        calls[piece.index][1] += piece.arguments
    return [(name, arguments) for name, arguments in calls.values()]


async def test_answers_fit_their_grammars_beside_free_ones(backend: LlamaBackend) -> None:
    """In one batch a schema, an expression, a choice, a Lark grammar and none: each is obeyed, and no other touched."""
    choice = Grammar(syntax="regex", text="yes|no|perhaps")
    lark = Grammar(syntax="lark", text='start: "<" WORD ("," WORD)* ">"\nWORD: /[a-c]{1,3}/')
    free = ask("Count to three.", Sampling(temperature=0, max_tokens=12))
    alone = text_of(await answer(backend, free))

    asked = [ask(grammar=JSON), ask(grammar=DATE), ask(grammar=choice), ask(grammar=lark), free]
    person, date, chosen, words, beside = await asyncio.gather(*(answer(backend, one) for one in asked))

    assert set(json.loads(text_of(person))) == {"name", "age"}
    assert re.fullmatch(DATE.text, text_of(date))
    assert text_of(chosen) in ("yes", "no", "perhaps")
    assert re.fullmatch("<[a-c,]+>", text_of(words))
    assert [deltas[-1].finish_reason for deltas in (person, date, chosen, words)] == ["stop"] * 4
    assert text_of(beside) == alone


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.5, "logprobs": 2},
        {"temperature": 0.0, "logit_bias": {0: 100.0, 2: 100.0}, "min_tokens": 50, "ignore_eos": True},
    ],
    ids=["greedy", "hot and cut", "penalties", "bias towards the end"],
)
async def test_every_mode_obeys_a_grammar(backend: LlamaBackend, fields: dict[str, Any]) -> None:
    """S-42: the text fits, ends with its last character, and nothing that ends an answer is shown."""
    deltas = await answer(backend, ask(sampling=Sampling(**({"seed": 3, "max_tokens": 100} | fields)), grammar=JSON))

    assert set(json.loads(text_of(deltas))) == {"name", "age"}
    assert deltas[-1].finish_reason == "stop"


async def test_a_limit_cuts_a_grammar_and_says_so(backend: LlamaBackend) -> None:
    """What came so far is the beginning of something that fits."""
    deltas = await answer(backend, ask(sampling=Sampling(temperature=0, max_tokens=3), grammar=JSON))

    assert deltas[-1].finish_reason == "length"
    assert text_of(deltas).startswith("{")


@pytest.mark.parametrize("seed", range(2))
async def test_a_required_call_comes_and_fits(backend: LlamaBackend, seed: int) -> None:
    """One call of the named tool with arguments by its schema, no text, and the reason says so."""
    request = ask(
        "What is the weather in Paris?",
        Sampling(temperature=1.2, seed=seed, max_tokens=100),
        tools=(WEATHER, Tool(name="other")),
        tool_choice="required",
        allowed_tools=("get_weather",),
        parallel_tool_calls=False,
    )

    deltas = await answer(backend, request)

    [(name, arguments)] = calls_of(deltas)
    assert name == "get_weather"
    assert json.loads(arguments)["days"] in (1, 2)
    assert deltas[-1].finish_reason == "tool_calls"
    assert not text_of(deltas).strip()


async def test_a_strict_tool_leaves_text_free(backend: LlamaBackend) -> None:
    """With `auto` the model may talk; markers that it does not write are not forced on it."""
    strict = Tool(name="get_weather", parameters=json.dumps(CITY), strict=True)

    deltas = await answer(backend, ask("Say hello.", Sampling(temperature=0, max_tokens=10), tools=(strict,)))

    assert text_of(deltas)
    assert deltas[-1].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"grammar": Grammar(syntax="lark", text="start: nothing")}, "grammar"),
        ({"grammar": Grammar(syntax="regex", text="(?=a)b")}, "grammar"),
        ({"tools": (Tool(name="odd", parameters='{"type":"array","contains":{}}', strict=True),)}, "tools"),
        ({"sampling": Sampling(logit_bias={1 << 20: 1.0})}, "logit_bias"),
        ({"sampling": Sampling(stop_token_ids=(1 << 20,))}, "stop_token_ids"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    backend: LlamaBackend, fields: dict[str, Any], param: str
) -> None:
    """S-41, S-42: a BadRequest of the edge that names the field; who asks beside it is answered."""
    refused, fine = await asyncio.gather(
        answer(backend, ask(**fields)), answer(backend, ask(grammar=DATE)), return_exceptions=True
    )

    assert isinstance(refused, BadRequest)
    assert (refused.param, refused.source) == (param, "edge")
    assert isinstance(fine, list)
    assert re.fullmatch(DATE.text, text_of(fine))


async def test_a_grammar_that_blows_up_stalls_nobody(backend: LlamaBackend) -> None:
    """S-41: while a costly grammar is tried out and refused, a running answer goes on and ends."""
    bomb = Grammar(syntax="lark", text="start: /(.*a.{0,50}){8}/")

    refused, fine = await asyncio.gather(
        answer(backend, ask(grammar=bomb)),
        answer(backend, ask("Count.", Sampling(temperature=0, max_tokens=40, ignore_eos=True))),
        return_exceptions=True,
    )

    assert isinstance(refused, BadRequest)
    assert isinstance(fine, list)
    assert fine[-1].usage is not None
    assert fine[-1].usage.completion_tokens == 40


async def test_bias_minimum_and_stop_tokens(backend: LlamaBackend) -> None:
    """A biased token wins, a stop token ends the answer unseen, and no end comes before `min_tokens`."""
    a = 81  # "p"
    biased = await answer(backend, ask(sampling=Sampling(temperature=0, max_tokens=3, logit_bias={a: 100})))
    again = Sampling(temperature=0, max_tokens=9, logit_bias={a: 100}, stop_token_ids=(a,))
    stopped = await answer(backend, ask(sampling=again))
    late = await answer(backend, ask(sampling=Sampling(temperature=0, max_tokens=9, logit_bias={2: 100}, min_tokens=5)))

    assert len(text_of(biased)) == 3
    assert len(set(text_of(biased))) == 1
    assert stopped[-1].usage is not None
    assert late[-1].usage is not None
    assert (text_of(stopped), stopped[-1].finish_reason, stopped[-1].usage.completion_tokens) == ("", "stop", 1)
    assert (late[-1].finish_reason, late[-1].usage.completion_tokens) == ("stop", 6)
