"""Against a server that is none of ours: `transformers serve` with the tiny model, in a process of its own."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cloud_engine.gateway.upstream import Upstream
from cloud_engine.model.tokenizer import Tokenizer
from shared.errors import BadRequest
from shared.schemas import ChatRequest, Delta, Message, Sampling

pytestmark = pytest.mark.system
MESSAGES = (Message(role="user", content="hello there"),)


@asynccontextmanager
async def transformers_serve(model: Path, folder: Path) -> AsyncIterator[str]:
    """Its base URL, once it listens. Offline, with an empty cache of its own."""
    (folder / "hub").mkdir()
    env = {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "transformers"), "serve", str(model), "--host", "127.0.0.1", "--port", "0",
        "--device", "cpu", env=env, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        async with asyncio.timeout(120):
            while not (found := re.search(rb"running on (http://[0-9.:]+)", await process.stderr.readline())):
                assert not process.stderr.at_eof(), "it ended before it listened"
        rest = asyncio.create_task(process.stderr.read())
        yield f"{found.group(1).decode()}/v1"
    finally:
        process.kill()
        await process.wait()
    await rest


async def collect(upstream: Upstream, request: ChatRequest) -> list[Delta]:
    async with aclosing(upstream.answer(request)) as deltas:
        return [delta async for delta in deltas]


def request(**sampling: Any) -> ChatRequest:
    limits = {"temperature": 0.0, "max_tokens": 8, **sampling}
    return ChatRequest(id="r1", model="cloud", messages=MESSAGES, sampling=Sampling(**limits))


async def test_another_projects_server_answers(tiny_model: Path, tmp_path: Path) -> None:
    """Text, end and usage, which agrees with our tokenizer; the same after a cancel; what it ignores is said."""
    prompt_tokens = len(Tokenizer(tiny_model).encode_chat(MESSAGES))
    async with transformers_serve(tiny_model, tmp_path) as url:
        upstream = Upstream(url, str(tiny_model), context_length=256)
        try:
            first = await collect(upstream, request())
            assert "".join(delta.text for delta in first)
            assert first[-1].finish_reason == "length"
            assert first[-1].usage is not None
            assert (first[-1].usage.prompt_tokens, first[-1].usage.completion_tokens) == (prompt_tokens, 8)

            async with aclosing(upstream.answer(request(max_tokens=200))) as deltas:
                await anext(deltas)
            assert await collect(upstream, request()) == first
            assert len(await asyncio.gather(*(collect(upstream, request()) for _ in range(4)))) == 4

            with pytest.raises(BadRequest, match="no logprobs"):
                await collect(upstream, request(logprobs=1))
        finally:
            await upstream.aclose()
