import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from bad_input import BODIES, CHAT, REQUESTS, chat, exchange, status_of
from fakes import EchoAnswer, FakeEngine, ScriptedAnswer
from prometheus_client import CollectorRegistry
from serving import served
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from cloud_engine.gateway.limits import TenantLimits
from cloud_engine.gateway.server import Gateway
from shared.errors import ContextTooLong, Internal
from shared.frames import MAX_FRAME, SUBPROTOCOLS, WIRE_PATH
from shared.guard import Guard
from shared.keys import Keys, new_key
from shared.schemas import Answer, Delta, ModelCard, Usage
from shared.telemetry import RequestFinished

CARD = ModelCard(id="org/real", context_length=2048)
JSON = {"content-type": "application/json"}
ONE, LAST = Delta(text="one", tokens=1), Delta(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=1))


class Running:
    """A gateway being served, and what it told its listeners."""

    def __init__(self, gateway: Gateway, engine: FakeEngine, port: int, events: list[RequestFinished]) -> None:
        self.gateway, self.engine, self.port, self.events = gateway, engine, port, events

    def client(self, **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", headers={**JSON, **headers}, timeout=60)


@asynccontextmanager
async def gateway(
    inner: Answer, *, keys: Keys | None = None, limits: TenantLimits | None = None
) -> AsyncIterator[Running]:
    engine, events = FakeEngine(inner), []
    made = Gateway(
        engine,
        CARD,
        keys=keys,
        limits=limits or TenantLimits(),
        guard=Guard(),
        registry=CollectorRegistry(),
        listeners=(events.append,),
    )
    async with served(made.app, ws_max_size=MAX_FRAME) as port:
        yield Running(made, engine, port, events)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Keys, str, str]:
    """A key file with a key of tenant a and one of tenant b."""
    file, now = tmp_path / "keys", datetime(2026, 11, 21, tzinfo=UTC)
    one, two = new_key(file, "a", now=now), new_key(file, "b", now=now)
    return Keys(file, source="cloud"), f"Bearer {one}", f"Bearer {two}"


async def test_the_whole_table_of_bad_input_is_refused() -> None:
    """On the cloud's own surface as on the edge's: typed, named, `cloud` failed, the engine not called."""
    async with gateway(EchoAnswer()) as running, running.client() as http:
        for case in BODIES:
            reply = await http.post(case.path, content=case.body, headers=case.headers)
            error = reply.json()["error"]
            got = (reply.status_code, error["code"], error["param"], error["source"])
            assert got == (case.status, case.code, case.param, "cloud"), case.name
        for raw in REQUESTS:
            assert status_of(await exchange(running.port, raw.data)) in raw.statuses, raw.name
        assert not running.engine.salts
        assert (await http.post(CHAT, content=chat())).status_code == 200


async def test_without_keys_any_key_will_do() -> None:
    """On loopback inference needs no key; a key that is sent anyway does no harm."""
    async with gateway(EchoAnswer()) as running:
        for headers in ({}, {"authorization": "Bearer whatever"}):
            async with running.client(**headers) as http:
                assert (await http.post(CHAT, content=chat())).status_code == 200
    assert running.engine.salts == ["local", "local"]


async def test_with_keys_every_route_but_health_needs_one(keys: tuple[Keys, str, str]) -> None:
    """HTTP and socket alike: no key, a foreign key and rubbish are 401; a key lets in as its tenant."""
    store, one, two = keys
    async with gateway(EchoAnswer(), keys=store) as running:
        routes = {getattr(route, "path", "") for route in running.gateway.app.router.routes}
        assert routes == {
            CHAT,
            "/v1/completions",
            "/v1/embeddings",
            "/v1/models",
            "/v1/models/{name:path}",
            "/health",
            "/metrics",
            WIRE_PATH,
        }
        for value in ({}, {"authorization": one[:-1] + "x"}, {"authorization": one.removeprefix("Bearer ")}):
            async with running.client(**value) as http:
                for path in (CHAT, "/v1/completions", "/v1/embeddings"):
                    assert (await http.post(path, content=chat())).status_code == 401, path
                for path in ("/v1/models", "/v1/models/auto", "/metrics"):
                    assert (await http.get(path)).status_code == 401, path
                assert (await http.get("/health")).status_code == 200
            assert await upgrade(running.port, value) == 401
        assert not running.engine.salts
        for value in (one, two):
            async with running.client(authorization=value) as http:
                assert (await http.post(CHAT, content=chat())).status_code == 200
            assert await upgrade(running.port, {"authorization": value}) == 101
    assert running.engine.salts == ["a", "b"]
    assert [event.tenant for event in running.events] == ["a", "b"]


async def upgrade(port: int, headers: dict[str, str]) -> int:
    """The status that an upgrade to the wire is answered with."""
    try:
        url = f"ws://127.0.0.1:{port}{WIRE_PATH}"
        async with connect(url, additional_headers=headers, subprotocols=list(SUBPROTOCOLS), proxy=None):
            return 101
    except InvalidStatus as error:
        return error.response.status_code


async def test_the_key_is_asked_for_before_the_body_is_read(keys: tuple[Keys, str, str]) -> None:
    """Who has no key cannot make us hold a body: 401 comes while it is still to be sent."""
    async with gateway(EchoAnswer(), keys=keys[0]) as running:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += "content-length: 100000\r\n\r\n"
        assert status_of(await exchange(running.port, head.encode())) == 401


async def test_models_are_its_own_and_the_virtual_ones() -> None:
    """`auto` and `cloud` mean the one model; another name is refused, saying which there are."""
    async with gateway(EchoAnswer()) as running, running.client() as http:
        assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["org/real", "auto", "cloud"]
        for name in ("org/real", "auto", "cloud"):
            assert (await http.post(CHAT, content=chat(model=name))).status_code == 200
        refused = await http.post(CHAT, content=chat(model="edge"))
    assert refused.status_code == 404
    assert "org/real, auto, cloud" in refused.json()["error"]["message"]


async def test_the_route_is_said_first_and_last() -> None:
    """Headers and the last chunk name the target, the reason and the real model."""
    async with gateway(ScriptedAnswer(ONE, ONE, LAST)) as running, running.client() as http:
        reply = await http.post(CHAT, content=chat(stream=True))
    assert (reply.headers["x-causeway-route"], reply.headers["x-causeway-reason"]) == ("cloud", "requested")
    assert '"causeway":{"route":"cloud","reason":"requested","failovers":0,"model":"org/real"}' in reply.text


async def test_every_request_is_one_event_and_one_count() -> None:
    """Done, failed, refused by a limit, left by its client: one usage event each, and no place is lost."""
    never = asyncio.Event()
    scripted = ScriptedAnswer(ONE, LAST)
    async with gateway(scripted, limits=TenantLimits(concurrent=1)) as running, running.client() as http:
        await http.post(CHAT, content=chat())
        scripted.script = (ContextTooLong("too long", param="messages"),)
        await http.post(CHAT, content=chat())
        await http.post(CHAT, content=chat(model="none"))
        scripted.script = (ONE, never)
        scripted.begun.clear()
        async with http.stream("POST", CHAT, content=chat(stream=True)) as reply:
            assert reply.status_code == 200
            refused = await http.post(CHAT, content=chat())
        await scripted.idle()
        scripted.script = (ONE, LAST)
        assert (await http.post(CHAT, content=chat())).status_code == 200
        metrics = (await http.get("/metrics")).text

    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert [(event.outcome, event.error_code) for event in running.events] == [
        ("done", None),
        ("error", "context_length_exceeded"),
        ("error", "model_not_found"),
        ("error", "rate_limited"),
        ("cancelled", None),
        ("done", None),
    ]
    assert 'causeway_requests_total{code="",outcome="done",target="cloud"} 2.0' in metrics


async def test_n_choices_count_as_n_requests() -> None:
    """A tenant cannot get around its limit with n."""
    async with gateway(EchoAnswer(), limits=TenantLimits(concurrent=2)) as running, running.client() as http:
        assert (await http.post(CHAT, content=chat(n=2))).status_code == 200
        assert (await http.post(CHAT, content=chat(n=3))).status_code == 429
        assert (await http.post(CHAT, content=chat(n=2))).status_code == 200


async def test_the_engines_numbers_are_metrics() -> None:
    """Gauges and totals of the engine, under the names dashboards use."""
    async with gateway(EchoAnswer()) as running, running.client() as http:
        text = (await http.get("/metrics")).text
    for line in (
        "causeway_engine_running 1.0",
        "causeway_engine_waiting 2.0",
        "causeway_engine_waiting_batch 1.0",
        "causeway_engine_kv_blocks_used 3.0",
        "causeway_engine_kv_blocks_total 4.0",
        "causeway_engine_prefix_hit_tokens_total 5.0",
        "causeway_engine_prefix_query_tokens_total 6.0",
        "causeway_engine_preemptions_total 7.0",
        "causeway_engine_expired_total 9.0",
        "causeway_engine_generated_tokens_total 8.0",
    ):
        assert line in text.splitlines()


async def test_health_follows_the_engine() -> None:
    """ok while it serves, failed (503) once the engine is dead; no key and no engine call needed."""
    async with gateway(EchoAnswer()) as running, running.client() as http:
        assert (await http.get("/health")).json()["status"] == "ok"
        running.engine.failure = Internal("dead")
        dead = await http.get("/health")
    assert (dead.status_code, dead.json()["status"]) == (503, "failed")


async def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    """During the drain a new request is 503 with Retry-After and health says so; the running stream ends well."""
    release = asyncio.Event()
    answer = ScriptedAnswer(ONE, release, LAST)
    async with (
        gateway(answer) as running,
        running.client() as http,
        http.stream("POST", CHAT, content=chat(stream=True)) as reply,
    ):
        draining = asyncio.create_task(running.gateway.drain(10))
        await asyncio.sleep(0)
        refused = await http.post(CHAT, content=chat())
        health = await http.get("/health")
        assert not draining.done()
        release.set()
        text = (await reply.aread()).decode()
        await draining
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert "retry-after" in refused.headers
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    assert text.endswith("data: [DONE]\n\n")


async def test_a_foreign_page_cannot_open_the_wire() -> None:
    """An upgrade with a foreign Origin is 403 even where no key is needed."""
    async with gateway(EchoAnswer()) as running:
        assert await upgrade(running.port, {"origin": "https://evil.example"}) == 403
        assert await upgrade(running.port, {}) == 101
