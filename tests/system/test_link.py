"""A real edge and a real cloud with a network between them that breaks, and that keeps what passed over it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import local
import pytest
from clients import metric, until
from faults import Proxy, faulty, payloads

pytestmark = [pytest.mark.system, pytest.mark.model]

STORY = [{"role": "user", "content": "Tell a long story about a mountain."}]
TOKENS = 60


def sent(proxy: Proxy) -> bytes:
    """What the edge said over the WebSocket."""
    return b"".join(payloads(data) for data in proxy.connections)


@asynccontextmanager
async def edge_behind(
    proxy: Proxy, pair: Any, model: Path, folder: Path, stop_all: Callable[[local.Daemon], local.Daemon]
) -> AsyncIterator[httpx.AsyncClient]:
    """An edge of its own that reaches the pair's cloud through the proxy."""
    link = ["--cloud", f"ws://127.0.0.1:{proxy.port}", "--key-file", str(pair.folder / "edge.key")]
    daemon = await asyncio.to_thread(
        local.start, "edge-agent", folder / "log", "serve", "--model", str(model), "--port", "0", *link
    )
    stop_all(daemon)
    try:
        assert await asyncio.to_thread(until, lambda: metric(daemon.url, "causeway_link_connected") == 1)
        async with httpx.AsyncClient(base_url=daemon.url, timeout=120) as client:
            yield client
    finally:
        await asyncio.to_thread(local.end, daemon.process)


async def test_a_cut_stream_goes_on_where_it_was(pair: Any, model_path: Path, tmp_path: Path, stop_all: Any) -> None:
    """The connection breaks twice in mid-answer: the text is whole, and the cloud made each token once."""
    body = {"model": "cloud", "messages": STORY, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    key = {"authorization": f"Bearer {pair.edge_key}"}

    def generated() -> float:
        return metric(pair.cloud.url, "causeway_tokens_total", pair.edge_key, kind="completion")

    async with httpx.AsyncClient(base_url=pair.cloud.url, timeout=120, headers=key) as direct:
        whole = (await direct.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]["content"]
    before = generated()

    async with (
        faulty(int(pair.cloud.url.rsplit(":", 1)[1])) as proxy,
        edge_behind(proxy, pair, model_path, tmp_path, stop_all) as client,
    ):
        text, chunks, lines = "", 0, []
        async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
            async for line in reply.aiter_lines():
                lines.append(line)
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    text += "".join(choice["delta"].get("content") or "" for choice in choices)
                    chunks += 1
                    if chunks in (4, 12):
                        proxy.cut()

    assert proxy.happened["cut"] == 2
    assert proxy.happened["connected"] >= 3
    assert text == whole
    assert "data: [DONE]" in lines
    assert generated() == before + TOKENS


async def test_edge_only_puts_nothing_on_the_wire(pair: Any, model_path: Path, tmp_path: Path, stop_all: Any) -> None:
    """Of labelled requests, whichever way they are asked, not a byte passes the network; of a free one it does."""
    private, free = "quokka-private-1", "quokka-free-2"

    def asked(text: str, **fields: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": f"Write Python code for {text}"}], "max_tokens": 4} | fields

    async with (
        faulty(int(pair.cloud.url.rsplit(":", 1)[1])) as proxy,
        edge_behind(proxy, pair, model_path, tmp_path, stop_all) as client,
    ):
        url, label = "/v1/chat/completions", {"causeway": {"label": "edge_only"}}
        kept = [
            await client.post(url, json=asked(private, model="auto", **label)),
            await client.post(url, json=asked(private, model="auto"), headers={"x-causeway-label": "edge_only"}),
            await client.post(url, json=asked(private * 2000, model="auto", **label)),
            await client.post(url, json=asked(private, model="cloud", **label)),
        ]
        sent_free = await client.post(url, json=asked(free, model="cloud"))

    assert [reply.status_code for reply in kept] == [200, 200, 400, 403]
    assert {reply.headers["x-causeway-route"] for reply in kept[:2]} == {"edge"}
    assert sent_free.headers["x-causeway-route"] == "cloud"
    assert free.encode() in sent(proxy)
    assert private.encode() not in sent(proxy)
