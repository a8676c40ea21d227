"""What the engine's own door must survive: a real engine behind the gateway, asked by a client that means harm."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest
from prometheus_client import CollectorRegistry
from serving import served
from tiny_serving import collect, request, serving_tiny

from cloud_engine.gateway.limits import TenantLimits
from cloud_engine.gateway.server import Gateway
from shared.frames import MAX_FRAME
from shared.guard import Guard
from shared.schemas import Grammar, Sampling

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 4}
BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}


@asynccontextmanager
async def gateway(folder, **limits):
    async with serving_tiny(folder) as engine:
        made = Gateway(
            engine,
            engine.model_card(),
            keys=None,
            limits=TenantLimits(**limits),
            guard=Guard(),
            registry=CollectorRegistry(),
        )
        async with (
            served(made.app, ws_max_size=MAX_FRAME) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as api,
        ):
            yield api
        assert engine.failure is None


@pytest.mark.parametrize("path", BODIES)
async def test_nobody_brings_a_template_of_their_own(tiny_model, path):
    """S-39: a template, its variables, or the like is refused by name on every endpoint."""
    async with gateway(tiny_model) as api:
        for name in ("chat_template", "chat_template_kwargs", "tokenize", "add_generation_prompt", "documents"):
            reply = await api.post(path, json=BODIES[path] | {name: "{{ 1 }}"})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)
        assert (await api.post(path, json=BODIES[path])).status_code == 200


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 10**6),
        ("best_of", 10**6),
        ("stop", ["x"] * 100_000),
        ("logit_bias", {str(token): 1 for token in range(100_000)}),
        ("logit_bias", {"259": 1}),
        ("stop_token_ids", [1] * 100_000),
        ("max_tokens", 2**31),
    ],
)
async def test_fan_out_is_refused(tiny_model, path, name, value):
    """S-40: what multiplies one request into many, or one list into a million, is refused naming the field."""
    async with gateway(tiny_model) as api:
        reply = await api.post(path, json=BODIES[path] | {name: value})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)


async def test_fan_out_is_charged_before_it_runs(tiny_model):
    """S-40: n choices cost n times their tokens: a budget that holds one holds not all of them."""
    async with gateway(tiny_model, tokens_per_minute=100) as api:
        asked = CHAT | {"n": 8, "max_tokens": 50}
        assert (await api.post("/v1/chat/completions", json=asked)).status_code == 429


async def test_every_mode_at_once(tiny_model):
    """S-42: penalties with grammars, bias, logprobs, seeds, n and drafts, all in one batch: each is answered."""
    grammar = Grammar(syntax="regex", text="[a-z]{2,9}")
    modes = [
        Sampling(temperature=heat, seed=seed, max_tokens=12, repetition_penalty=rate, presence_penalty=2,
                 frequency_penalty=-2, logprobs=top, logit_bias={7: 100, 9: -100}, min_tokens=least, top_k=5, top_p=0.9)
        for seed, (heat, rate, top, least) in enumerate(
            [(0, 1e-6, 0, 12), (2, 10, 20, 0), (1, 1.1, None, 3), (0.01, 0.5, 5, 12)]
        )
    ]  # fmt: skip
    asked = [request("ab" * 20, mode, grammar=one) for mode in modes for one in (None, grammar)]
    async with serving_tiny(tiny_model, async_depth=1) as answer:
        answers = await asyncio.gather(*(collect(answer, one) for one in asked))
        assert answer.failure is None
    assert all(deltas[-1].finish_reason in ("stop", "length") for deltas in answers)


@pytest.mark.parametrize("salt", ["", "\x00", "é" * 100_000, "\ud800", "../..", "'; --"])
async def test_any_salt_is_only_a_salt(tiny_model, salt):
    """S-42: whatever a tenant is called, its requests are answered and the engine lives."""
    async with serving_tiny(tiny_model) as answer:
        deltas = [delta async for delta in answer.answer(request(sampling=Sampling(max_tokens=3)), salt=salt)]
        assert deltas[-1].finish_reason
        assert answer.failure is None
