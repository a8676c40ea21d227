"""Embeddings over HTTP, by the official client."""

from base64 import b64decode
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
import pytest
from edge_sides import Remote, daemon_over, policy_file
from fakes import EchoAnswer
from serving import served

from edge_agent.api.openai import openai_app
from edge_agent.embedder import Embedder
from shared.guard import Guard
from shared.keys import Keys, new_key


@pytest.fixture
async def embedder(tiny_file: Path) -> AsyncIterator[Embedder]:
    one = Embedder(tiny_file)
    yield one
    await one.aclose()


@pytest.fixture
async def url(tmp_path: Path, embedder: Embedder) -> AsyncIterator[str]:
    """An edge with a cloud that counts what it is asked; the policy prefers it."""
    remote = Remote(EchoAnswer("cloud"))
    daemon = replace(daemon_over(None, remote, policy_file(tmp_path, "mode: prefer_cloud")), embedder=embedder)
    async with served(openai_app(daemon, keys=None, guard=Guard())) as port:
        yield f"http://127.0.0.1:{port}/v1"
    assert not remote.seen


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_the_official_client_gets_vectors(url: str, encoding: str) -> None:
    """One vector an input, in order; the same whichever way they are written; the cloud hears nothing of it."""
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=60) as client:
        made = await client.embeddings.create(model="tiny", input=["the sky", "an egg"], encoding_format=encoding)
        one = await client.embeddings.create(model="auto", input="an egg", dimensions=4)
        names = [model.id async for model in client.models.list()]
    assert "tiny" in names
    if encoding == "float":
        assert [len(each.embedding) for each in made.data] == [32, 32]
    else:  # the client leaves what was asked for by name as it came
        assert [len(b64decode(str(each.embedding))) for each in made.data] == [128, 128]
    assert made.usage.prompt_tokens == 8
    assert len(one.data[0].embedding) == 4


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"model": "tiny", "input": ["the", "the " * 40]}, 400, "input[1]"),
        ({"model": "tiny", "input": [""]}, 400, "input[0]"),
        ({"model": "tiny", "input": [[1, 2], [99999]]}, 400, "input[1]"),
        ({"model": "tiny", "input": "the", "dimensions": 33}, 400, "dimensions"),
        ({"model": "text-embedding-3-small", "input": "the"}, 404, "model"),
        ({"model": "cloud", "input": "the"}, 404, "model"),
    ],
)
async def test_bad_input_is_refused_by_its_field(url: str, body: dict[str, object], status: int, field: str) -> None:
    """Status, field and who says so; the next request is served."""
    async with httpx.AsyncClient(timeout=60) as http:
        refused = await http.post(f"{url}/embeddings", json=body)
        served_next = await http.post(f"{url}/embeddings", json={"model": "edge", "input": "the"})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["source"]) == (status, field, "edge")
    assert served_next.status_code == 200


async def test_keys_hold_for_embeddings_too(tmp_path: Path, embedder: Embedder) -> None:
    """Where keys are required, none is no way in."""
    key = new_key(tmp_path / "keys", "client", now=datetime.now(UTC))
    keys = Keys(tmp_path / "keys", source="edge")
    daemon = replace(daemon_over(None, None, policy_file(tmp_path, "mode: prefer_edge")), embedder=embedder)
    async with (
        served(openai_app(daemon, keys=keys, guard=Guard())) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        body = {"model": "tiny", "input": "the"}
        without = await http.post("/v1/embeddings", json=body)
        with_key = await http.post("/v1/embeddings", json=body, headers={"authorization": f"Bearer {key}"})
    assert (without.status_code, with_key.status_code) == (401, 200)
