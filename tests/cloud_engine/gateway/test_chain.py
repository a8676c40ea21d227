"""An edge's connection -> a gateway whose engine is another server -> a second gateway: real sockets all the way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import EchoAnswer, FakeEngine, ScriptedAnswer
from prometheus_client import CollectorRegistry
from serving import served
from waiting import HANG_S

from cloud_engine.gateway.limits import TenantLimits
from cloud_engine.gateway.server import Backend, Gateway
from cloud_engine.gateway.upstream import Upstream
from edge_agent.backends.cloud import CloudBackend
from shared.errors import BadRequest, CausewayError, ContextTooLong, Overloaded, UpstreamFailed
from shared.frames import MAX_FRAME
from shared.guard import Guard
from shared.keys import Keys, new_key
from shared.schemas import Answer, ChatRequest, Delta, Message, ModelCard, Sampling, Usage

CARD = ModelCard(id="org/real", context_length=2048)
ONE, LAST = Delta(text="one", tokens=1), Delta(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=1))


@asynccontextmanager
async def gateway(engine: Any, card: ModelCard, keys: Keys | None = None) -> AsyncIterator[int]:
    made = Gateway(
        engine, card, keys=keys, limits=TenantLimits(), guard=Guard(), registry=CollectorRegistry(), listeners=()
    )
    async with served(made.app, ws_max_size=MAX_FRAME) as port:
        yield port


class Chain:
    def __init__(self, edge: CloudBackend, port: int, upstream: Upstream, second: FakeEngine) -> None:
        self.edge, self.port, self.upstream, self.second = edge, port, upstream, second


@asynccontextmanager
async def chain(inner: Answer, folder: Path, model: str = "cloud") -> AsyncIterator[Chain]:
    file, second = folder / "keys", FakeEngine(inner)
    key = new_key(file, "first-gateway", now=datetime(2026, 11, 21, tzinfo=UTC))
    async with gateway(second, CARD, Keys(file, source="cloud")) as behind:
        upstream: Backend = Upstream(f"http://127.0.0.1:{behind}/v1", model, key)
        await upstream.start()
        async with gateway(upstream, upstream.model_card()) as port:
            edge = CloudBackend(f"ws://127.0.0.1:{port}", "")
            try:
                yield Chain(edge, port, upstream, second)  # type: ignore[arg-type]
            finally:
                await edge.aclose()
                await upstream.aclose()


def request(text: str = "a b c", name: str = "r1", **sampling: Any) -> ChatRequest:
    messages = (Message(role="user", content=text),)
    return ChatRequest(id=name, model="cloud", messages=messages, sampling=Sampling(**sampling))


async def test_an_answer_passes_through_both(tmp_path: Path) -> None:
    """Text, logprobs, usage and end are those of the last engine; the first gateway has a key of its own there."""
    inner = EchoAnswer("cloud")
    async with chain(inner, tmp_path) as whole:
        async with aclosing(whole.edge.answer(request(logprobs=1, max_tokens=2))) as deltas:
            got = [delta async for delta in deltas]
        said = [delta async for delta in inner.answer(request(logprobs=1, max_tokens=2))]
        assert "".join(delta.text for delta in got) == "a b "
        assert [lp for delta in got for lp in delta.logprobs] == [lp for delta in said for lp in delta.logprobs]
        assert (got[-1].finish_reason, got[-1].usage) == ("length", said[-1].usage)
        assert whole.upstream.model_card().context_length == 2048
    assert whole.second.salts == ["first-gateway"]


async def test_a_cancel_at_the_edge_reaches_the_last_engine(tmp_path: Path) -> None:
    """Through the socket, the first gateway and the second one."""
    inner = ScriptedAnswer(ONE, asyncio.Event())
    async with chain(inner, tmp_path) as whole:
        async with aclosing(whole.edge.answer(request())) as deltas:
            assert (await anext(deltas)).text == "one"
        async with asyncio.timeout(HANG_S):
            await inner.idle()


@pytest.mark.parametrize(
    "error",
    [ContextTooLong("x", param="messages"), Overloaded("x", retry_after=2), BadRequest("x", param="temperature"),
     UpstreamFailed("x")],
)  # fmt: skip
@pytest.mark.parametrize("script", [[], [ONE]], ids=["first", "later"])
async def test_an_error_keeps_its_kind(error: CausewayError, script: list[Delta], tmp_path: Path) -> None:
    """The edge learns from the far end whether another target may do better."""
    async with chain(ScriptedAnswer(*script, error), tmp_path) as whole:
        with pytest.raises(CausewayError) as caught:
            async with aclosing(whole.edge.answer(request())) as deltas:
                async for _ in deltas:
                    pass
    got = caught.value
    assert (got.code, got.param, got.retry_after) == (error.code, error.param, error.retry_after)


async def test_twenty_at_once_get_their_own(tmp_path: Path) -> None:
    """No two answers meet on the way."""
    async with chain(EchoAnswer("cloud"), tmp_path) as whole:

        async def one(at: int) -> str:
            async with aclosing(whole.edge.answer(request(f"only {at} here", f"r{at}"))) as deltas:
                return "".join([delta.text async for delta in deltas])

        assert await asyncio.gather(*map(one, range(20))) == [f"only {at} here " for at in range(20)]


async def test_only_what_is_known_is_a_metric(tmp_path: Path) -> None:
    """Of an engine elsewhere: requests and tokens, no blocks or cache hits; each model is listed once."""
    async with (
        chain(EchoAnswer("cloud"), tmp_path) as whole,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{whole.port}") as http,
    ):
        async with aclosing(whole.edge.answer(request())) as deltas:
            assert [delta async for delta in deltas]
        text = (await http.get("/metrics")).text
        models = (await http.get("/v1/models")).json()["data"]
        health = await http.get("/health")
    names = {line.split()[0] for line in text.splitlines() if line.startswith("causeway_engine")}
    assert names == {"causeway_engine_running", "causeway_engine_waiting", "causeway_engine_generated_tokens_total"}
    assert "causeway_engine_generated_tokens_total 3.0" in text
    assert [model["id"] for model in models] == ["cloud", "auto"]
    assert (health.status_code, health.json()["status"]) == (200, "ok")
