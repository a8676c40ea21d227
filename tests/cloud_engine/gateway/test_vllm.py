"""Against vLLM itself: `CAUSEWAY_TEST_VLLM=ENV/bin/python pytest tests/cloud_engine/gateway/test_vllm.py`."""

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_llama

from cloud_engine.gateway.pool import Pool
from cloud_engine.gateway.upstream import Upstream
from cloud_engine.model.tokenizer import Tokenizer
from shared.errors import BadRequest, CausewayError, ContextTooLong, Overloaded, UnknownModel, UpstreamFailed
from shared.schemas import ChatRequest, Delta, Message, Sampling

VLLM = os.environ.get("CAUSEWAY_TEST_VLLM", "")  # read here, since no test sees the caller's CAUSEWAY_* settings
pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not VLLM, reason="CAUSEWAY_TEST_VLLM does not name the python of an environment with vLLM"),
]
KEY = "sk-canary"
MESSAGES = (Message(role="user", content="hello there"),)
SHAPE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of a size that vLLM's CPU kernels have."""


@asynccontextmanager
async def vllm_serve(model: Path, folder: Path) -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4"]
    command += ["--served-model-name", "tiny", "--api-key", KEY, "--enforce-eager"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = folder / "vllm.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(*command, env=env, cwd=folder, stdout=out, stderr=out)
    try:
        async with asyncio.timeout(400), httpx.AsyncClient() as http:
            while (await _status(http, f"http://127.0.0.1:{port}/health")) != 200:
                assert process.returncode is None, log.read_text("utf-8", "replace")[-3000:]
                await asyncio.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def _status(http: httpx.AsyncClient, url: str) -> int:
    try:
        return (await http.get(url)).status_code
    except httpx.HTTPError:
        return 0


def request(**sampling: Any) -> ChatRequest:
    limits = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling}
    return ChatRequest(id="r1", model="cloud", messages=MESSAGES, sampling=Sampling(**limits))


async def collect(answer: Any, one: ChatRequest) -> list[Delta]:
    async with aclosing(answer.answer(one)) as deltas:
        return [delta async for delta in deltas]


async def error_of(answer: Any, one: ChatRequest) -> CausewayError:
    with pytest.raises(CausewayError) as caught:
        await collect(answer, one)
    assert KEY not in str(caught.value)
    return caught.value


async def running(url: str) -> float:
    """What vLLM itself says is being computed."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{url}/metrics")).text
    return sum(
        float(value) for value in re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)", text, re.MULTILINE)
    )


async def test_a_real_vllm_answers(tmp_path: Path) -> None:
    """Its context length is asked for; text, usage, logprobs, cancel, errors; beside a dead member of the pool."""
    model = tiny_llama.save(tmp_path / "model", **SHAPE)
    prompt_tokens = len(Tokenizer(model).encode_chat(MESSAGES))
    async with vllm_serve(model, tmp_path) as url:
        upstream = Upstream(f"{url}/v1", "tiny", KEY)
        dead = Upstream("http://127.0.0.1:9/v1", "tiny", KEY)
        pool = Pool([dead, upstream])
        await pool.start()
        try:
            assert pool.model_card().context_length == 128
            got = await collect(pool, request(logprobs=2))
            assert got[-1].finish_reason == "length"
            assert got[-1].usage is not None
            assert (got[-1].usage.prompt_tokens, got[-1].usage.completion_tokens) == (prompt_tokens, 8)
            logprobs = [token for delta in got for token in delta.logprobs]
            assert len(logprobs) == 8
            assert all(len(token.top) == 2 for token in logprobs)

            async with aclosing(pool.answer(request(max_tokens=80))) as deltas:
                await anext(deltas)
                assert await running(url) == 1
            async with asyncio.timeout(10):
                while await running(url):  # noqa: ASYNC110 - metrics announce nothing
                    await asyncio.sleep(0.05)
            results = await asyncio.gather(*(collect(pool, request(max_tokens=20)) for _ in range(8)))
            assert len({"".join(delta.text for delta in one) for one in results}) == 1

            assert type(await error_of(upstream, request(max_tokens=500))) in (ContextTooLong, BadRequest)
            long = ChatRequest(id="r", model="cloud", prompt="x" * 400, sampling=Sampling(max_tokens=4))
            assert type(await error_of(upstream, long)) is ContextTooLong
            assert type(await error_of(Upstream(f"{url}/v1", "none", KEY, context_length=9), request())) is UnknownModel
            assert (
                type(await error_of(Upstream(f"{url}/v1", "tiny", "no", context_length=9), request())) is UpstreamFailed
            )
            assert type(await error_of(Upstream(f"{url}/v1", "tiny", KEY, concurrent=0), request())) is Overloaded
        finally:
            await pool.aclose()
