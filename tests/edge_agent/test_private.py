"""Nothing of a request labelled edge_only crosses the network, whatever breaks around it."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from edge_sides import Local, ask, collect
from fakes import EchoAnswer
from faults import Proxy, faulty, payloads
from serving import served
from starlette.applications import Starlette

from cloud_engine.gateway.socket import SocketEndpoint
from edge_agent.backends.cloud import CloudBackend
from edge_agent.cache.answers import AnswerCache
from edge_agent.cache.memory import MemoryLayer
from edge_agent.cache.store import Store
from edge_agent.daemon import Daemon, put_together
from edge_agent.policies.center import PolicyCenter
from edge_agent.policies.history import History
from edge_agent.policies.signer import Signer
from router.policy import InvalidPolicy
from shared.errors import CausewayError, Overloaded, UpstreamFailed
from shared.schemas import ChatRequest, Delta
from shared.streams import ClientRules

REQUESTS, CLIENTS = 1000, 20
PRIVATE, FREE = "quokka-private", "wombat-free"
QUICK = ClientRules(ping_every=0.1, silent_after=0.5, welcome_within=0.5, ack_within=0.02)
POLICIES = (
    "mode: prefer_cloud\nfirst_token_timeout_s: 0.2",
    "mode: only_cloud\nfallback: none\nfirst_token_timeout_s: 0.2",
    "mode: prefer_edge\nprivacy: {personal: free, secrets: free}\nshadow: {mode: only_cloud}",
    "mode: prefer_edge\nfirst_token_timeout_s: 0.2\nrules: [{name: up, target: cloud, fallback: false}]",
    "mode: prefer_cloud\nbreaker: {consecutive_failures: 1, cool_down_s: 0.01}",
    "mode: [",
)


class Breakable:
    """The cloud's engine: while `broken` it fails before its first token, in the middle, or never begins."""

    def __init__(self) -> None:
        self.inner, self.broken, self.failed = EchoAnswer("cloud"), False, 0

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        broken = self.broken
        self.failed += broken
        if broken and self.failed % 2:
            raise Overloaded("broken for this test")
        async with aclosing(self.inner.answer(request)) as deltas:
            async for delta in deltas:
                yield delta
                if broken:
                    raise UpstreamFailed("broken for this test")


async def break_things(proxy: Proxy, daemon: Daemon, cloud: Breakable, chance: random.Random) -> None:
    """The cloud, the network, the cache and the policy, one after another, until cancelled."""
    while True:
        cloud.broken = chance.random() < 0.3
        match chance.randrange(5):
            case 0:
                proxy.cut()
            case 1:
                proxy.refuse = True
                proxy.cut()
            case 2:
                proxy.black_hole = True
            case 3 if daemon.cache is not None:
                await daemon.cache.clear()
            case _:
                with suppress(InvalidPolicy):
                    version = daemon.policy.propose(chance.choice(POLICIES), "test", "chaos")
                    daemon.policy.activate(version.number, "test", "chaos")
        await asyncio.sleep(0.02)
        proxy.refuse = proxy.black_hole = False
        await asyncio.sleep(0.05)


def wire(proxy: Proxy) -> bytes:
    """All that crossed it, as it was and unmasked."""
    return b"".join(payloads(data) for data in proxy.connections) + bytes(proxy.up)


async def client(daemon: Daemon, number: int, chance: random.Random) -> list[CausewayError | None]:
    """Private requests, and free ones between them, under every name for a model."""
    ended = []
    for turn in range(REQUESTS // CLIENTS):
        model = chance.choice(("auto", "cloud", "edge", "echo"))
        text = f"{PRIVATE} {number} {turn}"
        _, error = await collect(daemon.intake, ask(text, id=f"p{number}.{turn}", model=model, label="edge_only"))
        ended.append(error)
        if turn % 3 == 0:
            await collect(daemon.intake, ask(f"{FREE} {number} {turn}", id=f"f{number}.{turn}"))
        await asyncio.sleep(0.02)
    return ended


async def test_a_thousand_private_requests_put_nothing_on_the_wire(tmp_path: Path) -> None:
    """While the network, the cache and the policy are broken and exchanged at random; free requests do cross it."""
    chance, engine = random.Random(11), Breakable()
    endpoint = SocketEndpoint(answer_for=lambda _: engine, authenticate=lambda _: "tenant")
    history = History(tmp_path / "policies.db", Signer(b"k" * 32))
    async with (
        served(Starlette(routes=[endpoint.route()]), drain=endpoint.aclose) as port,
        faulty(port) as proxy,
    ):
        url, options = f"ws://127.0.0.1:{proxy.port}", {"jitter": lambda: 0.01, "rules": QUICK}
        cloud = CloudBackend(url, "key", keep_connected=True, first_token_timeout=None, resume_ttl=0.5, **options)  # type: ignore[arg-type]
        cloud.start()
        local = Local(EchoAnswer())
        cache = AnswerCache(Store((MemoryLayer(1 << 20),)))
        daemon = put_together(local, cloud, PolicyCenter(None, history), cache=cache)
        breaking = asyncio.create_task(break_things(proxy, daemon, engine, chance))
        try:
            ended = await asyncio.gather(*(client(daemon, number, chance) for number in range(CLIENTS)))
        finally:
            breaking.cancel()
            await asyncio.gather(breaking, return_exceptions=True)
        proxy.refuse = proxy.black_hole = False
        healed = daemon.policy.propose("mode: prefer_cloud\nbreaker: {cool_down_s: 0.1}", "test", "peace")
        daemon.policy.activate(healed.number, "test", "peace")
        async with asyncio.timeout(60):
            while FREE.encode() not in wire(proxy) or engine.failed < 2:
                engine.broken = engine.failed < 2  # at the latest now
                await collect(daemon.intake, ask(FREE, id=f"f{len(proxy.up)}.{time.monotonic_ns()}", model="cloud"))
                await asyncio.sleep(0.05)
        await cloud.aclose()
    exchanged = len(history.versions())
    history.close()

    answered = [error for errors in ended for error in errors]
    assert len(answered) == REQUESTS
    assert any(error is None for error in answered)
    assert proxy.happened["cut"] > 0
    assert len(proxy.connections) > 1
    assert exchanged > 1
    assert engine.failed > 1
    assert FREE.encode() in wire(proxy)
    assert PRIVATE.encode() not in wire(proxy)
    texts: Any = [request.messages[0].content for request in local.inner.requests]  # type: ignore[attr-defined]
    assert any(PRIVATE in text for text in texts)
