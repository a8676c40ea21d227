"""The cache as a client sees it, and as who runs the daemon does."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from edge_sides import HERE, daemon_over, policy_file
from fakes import ScriptedAnswer
from serving import served

from edge_agent.api.admin import add_admin
from edge_agent.api.openai import openai_app
from edge_agent.cache.answers import AnswerCache
from edge_agent.cache.memory import MemoryLayer
from edge_agent.cache.store import Store
from edge_agent.daemon import Daemon
from shared.guard import Guard
from shared.keys import Keys, new_key

BODY = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
CHAT = "/v1/chat/completions"
ADMIN = {"authorization": "Bearer t0ken", "content-type": "application/json"}


@asynccontextmanager
async def edge(folder: Path, keys: Keys | None = None) -> AsyncIterator[tuple[Daemon, httpx.AsyncClient]]:
    cache = AnswerCache(Store([MemoryLayer(1 << 20)]))
    daemon = daemon_over(ScriptedAnswer(*HERE), None, policy_file(folder, "mode: prefer_edge"), cache)
    app = openai_app(daemon, keys=keys, guard=Guard())
    add_admin(app, daemon, token="t0ken")
    async with served(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield daemon, client


def said(reply: httpx.Response) -> Any:
    """Text, usage and route of a reply, streamed or not."""
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    if not events:
        body = reply.json()
        return body["choices"][0]["message"]["content"], body["usage"], body["causeway"]
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    return text, events[-1]["usage"], next(event["causeway"] for event in events if "causeway" in event)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_says_whether_it_comes_from_the_cache(tmp_path: Path, stream: bool) -> None:
    """In its headers, with its age, and in its body; a streamed hit is a stream; its prompt counts as cached."""
    body = BODY | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
    async with edge(tmp_path) as (_, client):
        miss = await client.post(CHAT, json=body)
        hit = await client.post(CHAT, json=body)
        bypass = await client.post(CHAT, json=body, headers={"cache-control": "no-store"})

    assert [reply.headers["x-causeway-cache"] for reply in (miss, hit, bypass)] == ["miss", "hit", "bypass"]
    assert "age" not in miss.headers
    assert hit.headers["age"] == "0"
    assert "cache hit: memory, 0 s old" in hit.headers["x-causeway-reason"]
    assert hit.headers["x-causeway-route"] == "edge"
    assert said(hit)[0] == said(miss)[0] == "from here"
    assert said(hit)[1] == said(miss)[1] | {"prompt_tokens_details": {"cached_tokens": 3}}
    assert [said(reply)[2]["cache"] for reply in (miss, hit)] == ["miss", "hit"]
    assert hit.headers["content-type"] == miss.headers["content-type"]


async def test_cache_control_that_cannot_be_obeyed_is_an_error(tmp_path: Path) -> None:
    """only-if-cached without an answer: 504; an age that is no number: 400. Both name the header."""
    async with edge(tmp_path) as (daemon, client):
        missing = await client.post(CHAT, json=BODY, headers={"cache-control": "only-if-cached"})
        wrong = await client.post(CHAT, json=BODY, headers={"cache-control": "max-age=soon"})

    assert (missing.status_code, missing.json()["error"]["code"]) == (504, "not_cached")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "bad_request")
    assert {reply.json()["error"]["param"] for reply in (missing, wrong)} == {"cache-control"}
    assert not daemon.local.inner.requests  # type: ignore[attr-defined]


async def test_tenants_do_not_see_each_others_answers(tmp_path: Path) -> None:
    """S-47: another key's tenant asks the same, and is answered anew."""
    file = tmp_path / "keys"
    tokens = [new_key(file, tenant, now=datetime.now(UTC)) for tenant in ("ann", "bob")]
    async with edge(tmp_path, Keys(file, source="edge")) as (_, client):
        replies = [
            await client.post(CHAT, json=BODY, headers={"authorization": f"Bearer {token}"})
            for token in (*tokens, *tokens)
        ]

    assert [reply.headers["x-causeway-cache"] for reply in replies] == ["miss", "miss", "hit", "hit"]


async def test_status_metrics_and_clear(tmp_path: Path) -> None:
    """Who runs it sees what each layer holds and did, and can empty them; hits count as no tokens made."""
    async with edge(tmp_path) as (daemon, client):
        for _ in range(3):
            await client.post(CHAT, json=BODY)
        before = (await client.get("/admin/status", headers=ADMIN)).json()["cache"]
        cleared = (await client.post("/admin/cache/clear", headers=ADMIN)).json()["cache"]
        after = await client.post(CHAT, json=BODY)

    assert before["requests"] == {"hit": 2, "shared": 0, "miss": 1, "bypass": 0}
    assert before["layers"]["memory"] | {"size": 0} == {
        "entries": 1,
        "size": 0,
        "evictions": 0,
        "errors": 0,
        "hits": 2,
        "misses": 1,
    }
    assert cleared["layers"]["memory"]["entries"] == cleared["layers"]["memory"]["size"] == 0
    assert after.headers["x-causeway-cache"] == "miss"

    def sample(name: str, **labels: str) -> float | None:
        return daemon.registry.get_sample_value(name, labels)

    assert sample("causeway_cache_requests_total", use="hit") == 2
    assert sample("causeway_cache_hits_total", layer="memory") == 2
    assert sample("causeway_cache_bytes", layer="memory") == daemon.cache.stats()["layers"]["memory"]["size"]  # type: ignore[union-attr]
    assert sample("causeway_tokens_total", kind="completion") == 2 * 2
    assert sample("causeway_requests_total", target="edge", outcome="done", code="") == 4
