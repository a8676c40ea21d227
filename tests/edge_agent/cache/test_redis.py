"""The shared layer over a real server."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
from cache_parts import Clock, entry, query
from services import RedisServer, redis_server
from structlog.testing import capture_logs
from waiting import HANG_S

from edge_agent.cache.redis import COOL_DOWN_S, FAILURES, PREFIX, RedisLayer
from edge_agent.cache.rows import Rows, Seal
from router.clauses import CacheRules


@pytest.fixture(scope="module")
def running() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    with redis.Redis.from_url(running.url) as client:
        client.flushall()
    return running


@asynccontextmanager
async def layer(url: str, **options: Any) -> AsyncIterator[RedisLayer]:
    layer = RedisLayer(url, **({"rows": Rows(), "patience_s": 20.0} | options))
    try:
        yield layer
    finally:
        await layer.aclose()


def contents(server: RedisServer) -> dict[bytes, bytes]:
    with redis.Redis.from_url(server.url) as client:
        return {name: client.get(name) for name in client.scan_iter()}


async def test_one_device_finds_what_another_kept(server: RedisServer) -> None:
    """The same question of the same tenant, and no other; under a name that has the tenant in it; not for ever."""
    async with layer(server.url, ttl_s=60) as one, layer(server.url) as other:
        await one.put(query(), entry())
        await one.flush()

        assert await other.get(query()) == entry()
        assert await other.get(query(tenant="ann")) is None
        assert await other.get(query("another")) is None
    (name,) = contents(server)
    assert name.startswith(PREFIX + query().key.tenant.hex().encode())
    with redis.Redis.from_url(server.url) as client:
        assert 0 < client.pttl(name) <= 60_000  # type: ignore[operator]


async def test_only_free_answers_leave_the_device(server: RedisServer) -> None:
    """Neither `edge_only` nor `redact`, and none where the policy says so; sealed, it can be read by no other."""
    async with layer(server.url) as open_, layer(server.url, rows=Rows(Seal("s" * 20))) as sealed:
        for kept in (open_, sealed):
            assert not kept.takes(query(label="edge_only"))
            assert not kept.takes(query(label="redact"))
            assert not kept.takes(query(rules=CacheRules(shared=False)))
            assert kept.takes(query())
        await sealed.put(query(), entry("quokka"))
        await sealed.flush()

        assert await sealed.get(query()) == entry("quokka")
        assert await open_.get(query()) is None
    assert not any(b"quokka" in row for row in contents(server).values())


async def test_what_others_wrote_there_is_a_miss(server: RedisServer) -> None:
    """S-24: a pickle, a damaged row, a list, half a gigabyte's beginning: never an answer, never an error."""
    name = PREFIX + query().key.tenant.hex().encode() + b":" + query().key.digest.hex().encode()
    row = bytearray(Rows().row(query().key, entry()) or b"")
    row[40] ^= 1
    async with layer(server.url) as kept:
        with redis.Redis.from_url(server.url) as client:
            for poison in (b"\x80\x04cposix\nsystem\n.", bytes(row), b"", bytes(8 << 20)):
                client.set(name, poison)
                assert await kept.get(query()) is None
            client.delete(name)
            client.rpush(name, "x")
            assert await kept.get(query()) is None
            assert kept.stats().errors == 1
            client.delete(name)
        await kept.put(query(), entry())
        await kept.flush()
        assert await kept.get(query()) == entry()


async def test_cleared_are_our_keys_alone(server: RedisServer) -> None:
    """What else lies on the server stays."""
    with redis.Redis.from_url(server.url) as client:
        client.set("theirs", "x")
    async with layer(server.url) as kept:
        for at in range(30):
            await kept.put(query(f"{at}"), entry())
        await kept.flush()
        await kept.clear()
        assert await kept.get(query("0")) is None
    assert contents(server) == {b"theirs": b"x"}


async def test_a_server_that_is_gone_is_left_alone_and_found_again() -> None:
    """Misses; after a few failures not even asked, which is logged once; back, it is used again."""
    clock = Clock(0.0)
    with redis_server() as server, capture_logs() as logs:
        async with layer(server.url, clock=clock) as kept:
            await kept.put(query(), entry())
            await kept.flush()
            server.stop()
            for _ in range(FAILURES + 3):
                assert await kept.get(query()) is None
            asked = kept.stats().errors
            server.start()
            await kept.put(query(), entry())
            await kept.flush()
            assert await kept.get(query()) is None
            clock.now += COOL_DOWN_S + 1
            await kept.put(query(), entry())
            await kept.flush()
            assert await kept.get(query()) == entry()

    assert asked == FAILURES
    assert [log["event"] for log in logs] == ["redis is left alone"]


async def test_a_server_that_says_nothing_costs_little() -> None:
    """It takes the connection and is silent: nobody waits longer than the layer's patience."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        async with layer(url, patience_s=0.05) as kept, asyncio.timeout(HANG_S):
            for _ in range(FAILURES + 5):
                assert await kept.get(query()) is None
            assert kept.stats().errors == FAILURES
