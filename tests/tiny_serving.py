"""A tiny model being served by its engine, and what tests ask of it."""

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager

from waiting import HANG_S

from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import EngineStats
from cloud_engine.engine.serving import EngineAnswer, load_engine
from shared.schemas import ChatRequest, Sampling

LONG = Sampling(temperature=0, max_tokens=200, ignore_eos=True)


def request(prompt: str = "hello", sampling: Sampling = LONG, **values) -> ChatRequest:
    return ChatRequest(**({"id": "r", "model": "tiny", "prompt": prompt, "sampling": sampling} | values))


@asynccontextmanager
async def serving_tiny(folder, **limits):
    values = {"num_blocks": 100, "model_len": 250, "max_num_seqs": 4}
    answer = load_engine(folder, EngineConfig(**(values | limits)), name="tiny")
    await answer.start()
    try:
        yield answer
    finally:
        await answer.aclose()


async def collect(answer: EngineAnswer, asked: ChatRequest):
    async with asyncio.timeout(HANG_S):
        return [delta async for delta in answer.answer(asked)]


async def until(answer: EngineAnswer, reached: Callable[[EngineStats], bool]) -> None:
    async with asyncio.timeout(HANG_S):
        while not reached(answer.stats()):  # noqa: ASYNC110 - statistics announce nothing
            await asyncio.sleep(0.001)


async def idle(answer: EngineAnswer) -> None:
    """Wait until nothing runs and every block is back."""
    await until(answer, lambda stats: not (stats.running or stats.waiting or stats.kv_blocks_used))
