"""The official `openai` client asks a real engine for vectors, over a real socket."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
import tiny_llama
import torch
from fakes import EchoAnswer, FakeEngine
from prometheus_client import CollectorRegistry
from serving import served
from tiny_serving import collect, idle, request, serving_tiny, until
from waiting import HANG_S

from cloud_engine.engine import vectors
from cloud_engine.gateway.limits import TenantLimits
from cloud_engine.gateway.server import Gateway
from shared.embeddings import EmbeddingRequest
from shared.errors import DeadlineExceeded, Overloaded
from shared.guard import Guard

TEXTS = ["hello", "a longer text of several words, in more than one chunk", "x"]


@asynccontextmanager
async def gateway(engine, card, *, limits: TenantLimits | None = None):
    events: list = []
    made = Gateway(
        engine,
        card,
        keys=None,
        limits=limits or TenantLimits(),
        guard=Guard(),
        registry=CollectorRegistry(),
        listeners=(events.append,),
    )
    async with served(made.app) as port:
        api = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
        async with api:
            yield api, events


@asynccontextmanager
async def client(folder, **changes):
    async with (
        serving_tiny(folder, max_num_batched_tokens=16, **changes) as engine,
        gateway(engine, engine.model_card()) as (api, events),
    ):
        yield api, engine, events


@torch.inference_mode()
def wanted(tokens: list[int], dimensions: int | None = None) -> list[float]:
    hidden = tiny_llama.oracle().model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0)[:dimensions], dim=0).tolist()


async def test_texts_and_tokens_in_both_encodings(tiny_model):
    """Vectors of transformers in the order of the inputs, and usage; texts and their tokens give the same."""
    tokens = [tiny_llama.tokenizer().encode(text) for text in TEXTS]
    expected = [pytest.approx(wanted(one), abs=2e-6) for one in tokens]
    async with client(tiny_model) as (api, engine, events):
        for given in (TEXTS, tokens):
            for encoding in ("float", "base64", openai.omit):  # left out, the client asks for base64 and decodes it
                reply = await api.embeddings.create(model="tiny", input=given, encoding_format=encoding, user="me")
                assert [one.index for one in reply.data] == [0, 1, 2]
                if encoding != "base64":
                    assert [one.embedding for one in reply.data] == expected
                assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, tokens))
        short = await api.embeddings.create(model="tiny", input=TEXTS[1], dimensions=5)
        one = await api.embeddings.create(model="tiny", input=tokens[0])
        await idle(engine)
    assert short.data[0].embedding == pytest.approx(wanted(tokens[1], 5), abs=2e-6)
    assert one.data[0].embedding == expected[0]
    assert {(event.outcome, event.usage.prompt_tokens) for event in events[:6]} == {("done", sum(map(len, tokens)))}


async def test_answers_beside_embeddings_stay_the_same(tiny_model):
    """A request that generates meanwhile gets the text that it gets alone."""
    async with client(tiny_model) as (api, engine, _):
        alone = await collect(engine, request())
        task = asyncio.create_task(collect(engine, request()))
        await until(engine, lambda stats: stats.running == 1)
        for _ in range(5):
            await api.embeddings.create(model="tiny", input=TEXTS)
        beside = await task
    assert "".join(delta.text for delta in beside) == "".join(delta.text for delta in alone)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input[0]", "bad_request"),
        ({"input": []}, "input", "bad_request"),
        ({"input": ["a", "b" * 251]}, "input[1]", "context_length_exceeded"),
        ({"input": [[5], [259]]}, "input[1]", "bad_request"),
        ({"input": ["a"] * 2049}, "input", "bad_request"),
        ({"dimensions": 49}, "dimensions", "bad_request"),
        ({"encoding_format": "int8"}, "encoding_format", "bad_request"),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)
async def test_bad_input_is_refused_by_name(tiny_model, fields, param, code):
    """Typed, naming the field, and the next request is answered."""
    async with client(tiny_model) as (api, _, events):
        with pytest.raises(openai.APIStatusError) as refused:
            await api.embeddings.create(**({"model": "tiny", "input": "a"} | fields))
        assert (refused.value.param, refused.value.code) == (param, code)
        assert (await api.embeddings.create(model="tiny", input="a")).usage.prompt_tokens == 1
        assert events[-1].outcome == "done"


async def test_who_leaves_is_not_computed_for(tiny_model):
    """A client that hangs up in the middle costs no more, and harms nobody."""
    async with client(tiny_model) as (api, engine, events):
        url = f"{api.base_url}embeddings"
        body = {"model": "tiny", "input": [[5] * 250] * 1000}
        async with httpx.AsyncClient() as http:
            task = asyncio.create_task(http.post(url, json=body))
            await until(engine, lambda stats: stats.embedded_tokens > 0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(HANG_S):
            while not events:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.001)
        reply = await api.embeddings.create(model="tiny", input="hello")
        await idle(engine)
        assert engine.stats().embedded_tokens < 250_000
    assert events[0].outcome == "cancelled"
    assert len(reply.data) == 1


async def test_no_request_waits_for_ever(tiny_model, monkeypatch):
    """What takes too long ends with DeadlineExceeded; a stopping engine says so; a full queue refuses."""
    many = EmbeddingRequest(id="r", model="tiny", inputs=((5,) * 250,) * 1000)
    async with serving_tiny(tiny_model, max_num_batched_tokens=16, max_waiting=1) as engine:
        task = asyncio.create_task(engine.embed(many))
        await until(engine, lambda stats: stats.embedded_tokens > 0)
        with pytest.raises(Overloaded):
            await engine.embed(many)
        await engine.aclose()
        with pytest.raises(Overloaded):
            await task
    monkeypatch.setattr(vectors, "TIMEOUT_S", 0.05)
    async with serving_tiny(tiny_model, max_num_batched_tokens=16) as engine:
        with pytest.raises(DeadlineExceeded):
            await engine.embed(many)
        await idle(engine)


async def test_limits_of_a_tenant_and_an_engine_without_vectors(tiny_model):
    """Requests a minute count vectors too; an engine that makes none says so by name."""
    async with serving_tiny(tiny_model) as engine:
        async with gateway(engine, engine.model_card(), limits=TenantLimits(requests_per_minute=1)) as (api, _):
            await api.embeddings.create(model="tiny", input="a")
            with pytest.raises(openai.RateLimitError):
                await api.embeddings.create(model="tiny", input="a")
        async with gateway(FakeEngine(EchoAnswer()), engine.model_card()) as (api, _):
            with pytest.raises(openai.BadRequestError) as refused:
                await api.embeddings.create(model="tiny", input="a")
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "model")
