"""10,000 short requests with random aborts: memory and blocks return to where they started."""

import asyncio
import gc
import random
from pathlib import Path

import httpx
import pytest
import tiny_llama
from prometheus_client import CollectorRegistry
from serving import served
from waiting import HANG_S

from cloud_engine.bench.load import Ask, Target, closed_loop, read
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.sequence import Sequence
from cloud_engine.engine.serving import load_engine
from cloud_engine.gateway.limits import TenantLimits
from cloud_engine.gateway.server import Gateway
from shared.guard import Guard
from shared.schemas import Sampling

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
SHARED = [7] * 8
WARM, REQUESTS = 2_000, 10_000
MAX_GROWTH = 24 << 20
"""Bytes of resident memory that allocators may keep: 3 KiB for each request after the first ones."""


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def alive(kind: type) -> int:
    return sum(type(one) is kind for one in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc for its memory")
def test_10000_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """Through the engine, with aborts at any moment, preemptions and prefix hits, which all must have happened."""
    engine = tiny_llama.engine(tiny_llama.save(tmp_path, **SMALL), num_blocks=73, max_num_seqs=64, max_waiting=64)
    rng = random.Random(0)
    aborted = done = 0
    before = 0
    for at in range(REQUESTS):
        prompt = rng.choice(([], SHARED)) + [rng.randrange(3, 259) for _ in range(rng.randint(1, 6))]
        most = 40 if rng.random() < 0.05 else rng.randint(1, 4)
        sampling = Sampling(temperature=rng.choice((0, 1)), max_tokens=most, ignore_eos=True)
        engine.add(str(at), prompt, sampling, salt=rng.choice("ab"))
        if rng.random() < 0.2:
            aborted += engine.abort(str(rng.randint(max(0, at - 40), at)))
        while engine.stats().waiting >= 16:
            done += sum(output.ending is not None for output in engine.step())
        if at == WARM:
            before = resident()
    while engine.has_work:
        done += sum(output.ending is not None for output in engine.step())
    stats = engine.stats()
    assert aborted > 500
    assert aborted + done == REQUESTS
    assert stats.preemptions > 10
    assert stats.prefix_hit_tokens > 1000
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert engine.scheduler.pool.num_free == engine.config.num_blocks - 1
    assert not any(engine.scheduler.pool.references)
    assert resident() - before < MAX_GROWTH
    assert alive(Sequence) == 0


async def test_requests_over_http_leave_nothing_behind(tmp_path: Path) -> None:
    """300 through the gateway, a third of them left after the first bytes: blocks, tasks and requests are back."""
    engine = load_engine(tiny_llama.save(tmp_path, **SMALL), EngineConfig(num_blocks=200, max_num_seqs=16), name="tiny")
    await engine.start()
    gateway = Gateway(engine, engine.model_card(), keys=None, limits=TenantLimits(), guard=Guard(),
                      registry=CollectorRegistry())  # fmt: skip
    rng = random.Random(0)
    async with served(gateway.app) as port:
        target = Target(f"http://127.0.0.1:{port}/v1", "cloud")
        await closed_loop(target, [target.ask(2, 4, rng) for _ in range(16)], 8)
        await _settled(engine)
        tasks = len(asyncio.all_tasks())
        async with asyncio.TaskGroup() as group:
            whole = group.create_task(closed_loop(target, [target.ask(2, 4, rng) for _ in range(200)], 8))
            await _leave(target, [target.ask(2, 150, rng) for _ in range(100)])
        replies, _ = whole.result()
        assert [read(reply, 4).error for reply in replies] == [None] * 200
        await _settled(engine)
        async with asyncio.timeout(HANG_S):
            while len(asyncio.all_tasks()) > tasks:  # noqa: ASYNC110 - tasks announce nothing
                await asyncio.sleep(0.01)
        generated = engine.stats().generated_tokens
        assert 216 * 4 + 100 <= generated < 216 * 4 + 100 * 150
    await engine.aclose()
    assert alive(Sequence) == 0


async def _leave(target: Target, asks: list[Ask]) -> None:
    """Each in turn, closed at its first text."""
    async with httpx.AsyncClient(headers={"content-type": "application/json"}) as http:
        for ask in asks:
            async with http.stream("POST", f"{target.base_url}/completions", content=ask.body) as reply:
                assert reply.status_code == 200, await reply.aread()
                async for piece in reply.aiter_raw():
                    if b'"text":"' in piece:
                        break


async def _settled(engine: object) -> None:
    async with asyncio.timeout(HANG_S):
        while True:
            stats = engine.stats()  # type: ignore[attr-defined]
            if not (stats.running or stats.waiting or stats.kv_blocks_used):
                return
            await asyncio.sleep(0.01)
