"""What an answer from the cache costs: in the process, and through HTTP beside generating it.

PYTHONPATH=deploy python -m tests.benchmarks.cache
"""

import asyncio
import http.client
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import local

from edge_agent.cache.base import Entry, Query, Scope
from edge_agent.cache.key import key_of
from edge_agent.cache.memory import MemoryLayer
from edge_agent.cache.store import Store
from router.clauses import CacheRules
from shared.models import default_store, resolve
from shared.schemas import ChatRequest, Delta, Message, Sampling, Usage
from tests.benchmarks.ratios import show

TOKENS = 64
HITS = 300
IN_PROCESS = 2000
SCOPE = Scope(tenant="", label="free", target="edge", model="m", weights="0" * 64, context_length=2048)


def measure(model: Path, rounds: int) -> Iterator[tuple[str, Sequence[float]]]:
    in_process = [asyncio.run(hit_us()) for _ in range(rounds)]
    generated, hits = [], []
    with tempfile.TemporaryDirectory() as folder:
        daemon = local.start("edge-agent", Path(folder) / "log", "serve", "--model", str(model), "--port", "0")
        try:
            with closing(http.client.HTTPConnection(daemon.url.removeprefix("http://"), timeout=300)) as connection:
                asked(connection, "warm up", "miss")
                for number in range(rounds):
                    generated.append(asked(connection, f"story {number}", "miss") * 1e3)
                    seconds = [asked(connection, f"story {number}", "hit") for _ in range(HITS)]
                    hits.append(statistics.median(seconds) * 1e3)
        finally:
            local.end(daemon.process)
    yield "cache: hit in memory, in the process, key made and answer read, p50, us (bar: under 50)", in_process
    yield f"cache: {TOKENS} tokens generated, over HTTP, ms", generated
    yield "cache: the same from the cache, over HTTP, p50, ms (bar: under 3)", hits
    yield "cache: generated / cached (bar: at least 50)", [a / b for a, b in zip(generated, hits, strict=True)]


async def hit_us() -> float:
    """Median of one look-up of a 64-token answer to a 1,000-character prompt."""
    store = Store([MemoryLayer(1 << 20)])
    message = Message(role="user", content="a question of some length " * 40)
    request = ChatRequest(id="r", model="auto", messages=(message,), sampling=Sampling(temperature=0))
    pieces = (Delta(text="word " * 50, tokens=50), Delta(text="word " * 14, tokens=14))
    last = Delta(finish_reason="stop", usage=Usage(prompt_tokens=200, completion_tokens=TOKENS))
    entry = Entry(deltas=(*pieces, last), model="m", target="edge", created=time.time(), ttl_s=3600)

    async def look_up() -> object:
        return await store.get(Query(key_of(request, SCOPE), request, SCOPE, CacheRules()))

    await store.put(Query(key_of(request, SCOPE), request, SCOPE, CacheRules()), entry)
    return await _median_us(look_up)


async def _median_us(work: Callable[[], Coroutine[Any, Any, object]]) -> float:
    seconds = []
    for _ in range(IN_PROCESS):
        start = time.perf_counter()
        if await work() is None:
            raise RuntimeError("a miss")
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


def asked(connection: http.client.HTTPConnection, prompt: str, use: str) -> float:
    """Seconds for one whole answer, which must be a hit or a miss as expected."""
    body = json.dumps(
        {
            "model": "edge",
            "messages": [{"role": "user", "content": f"Tell me a {prompt} of the sea."}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
    )
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    reply = connection.getresponse()
    said = reply.read()
    seconds = time.perf_counter() - start
    if reply.headers["x-causeway-cache"] != use or json.loads(said)["usage"]["completion_tokens"] != TOKENS:
        raise RuntimeError(f"status {reply.status}: not a {use} of {TOKENS} tokens")
    return seconds


if __name__ == "__main__":
    show(measure(resolve("smollm2:135m", store=default_store(os.environ, Path.home())), rounds=3))
