"""The official `openai` client against the gateway with a real engine: structured answers and calls of tools."""

import json
from contextlib import asynccontextmanager

import openai
import pytest
import tiny_llama
from prometheus_client import CollectorRegistry
from serving import served
from tiny_serving import serving_tiny

from cloud_engine.gateway.limits import TenantLimits
from cloud_engine.gateway.server import Gateway
from shared.frames import MAX_FRAME
from shared.guard import Guard

HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@asynccontextmanager
async def client(folder):
    model = tiny_llama.save(folder, max_position_embeddings=1024)
    async with serving_tiny(model, model_len=900, num_blocks=200) as engine:
        made = Gateway(
            engine,
            engine.model_card(),
            keys=None,
            limits=TenantLimits(),
            guard=Guard(),
            registry=CollectorRegistry(),
        )
        async with (
            served(made.app, ws_max_size=MAX_FRAME) as port,
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as api,
        ):
            yield api


async def test_structured_answers_and_calls(tmp_path):
    """n answers to a JSON schema with their log probabilities; a choice; a call that was required, streamed."""
    named = {"name": "trip", "schema": SCHEMA, "strict": True}
    tool = {"type": "function", "function": {"name": "plan", "parameters": SCHEMA, "strict": True}}
    async with client(tmp_path) as api:
        shaped = await api.chat.completions.create(
            model="tiny", messages=HELLO, n=2, seed=1, max_tokens=200, logprobs=True, top_logprobs=2,
            response_format={"type": "json_schema", "json_schema": named},
        )  # fmt: skip
        chosen = await api.completions.create(
            model="tiny", prompt="Yes or no?", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
        )
        async with api.chat.completions.stream(
            model="tiny", messages=HELLO, tools=[tool], tool_choice="required", seed=1, max_tokens=300,
            parallel_tool_calls=False,
        ) as stream:  # fmt: skip
            called = (await stream.get_final_completion()).choices[0]

    for choice in shaped.choices:
        assert choice.finish_reason == "stop"
        assert set(json.loads(choice.message.content or "")) == {"city", "days"}
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    assert chosen.choices[0].text in ("yes", "no")
    assert called.finish_reason == "tool_calls"
    [call] = called.message.tool_calls or []
    assert call.function.name == "plan"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}


async def test_a_grammar_that_cannot_be_used_names_its_field(tmp_path):
    """S-41: what the library refuses comes back as the field that the client wrote."""
    named = {"name": "n", "schema": {"type": "array", "contains": {"type": "null"}}}
    asked = {
        "response_format": {"response_format": {"type": "json_schema", "json_schema": named}},
        "structured_outputs": {"extra_body": {"structured_outputs": {"regex": "(?=a)b"}}},
    }
    async with client(tmp_path) as api:
        for param, extra in asked.items():
            with pytest.raises(openai.BadRequestError) as refused:
                await api.chat.completions.create(model="tiny", messages=HELLO, **extra)
            assert refused.value.param == param
