"""Ollama's routes about models, over a store in a folder of the test and a stand-in for where models come from."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import ollama
import pytest
from edge_apps import TOKEN, edge
from edge_sides import Local
from fakes import EchoAnswer
from model_origin import TEMPLATE, Origin, model_bytes, serving

from edge_agent.backends.base import Loaded
from edge_agent.models.installed import installed
from edge_agent.models.pull import pull
from shared.errors import UnknownModel

MODEL = model_bytes()


class Shelf(Local):
    """A Local with a store; notes what it was told about models."""

    def __init__(self, store: Path) -> None:
        super().__init__(EchoAnswer())
        self.folder = store
        self.told: list[tuple[str, str, float | None]] = []

    @property
    def store(self) -> Path:
        return self.folder

    def loaded(self) -> list[Loaded]:
        (one,) = super().loaded()
        return [one, replace(one, name="tiny", expires_at=datetime(2030, 1, 1, tzinfo=UTC))]

    async def load(self, name: str) -> None:
        self.told.append(("load", name, None))

    async def stop(self, name: str) -> bool:
        self.told.append(("stop", name, None))
        raise UnknownModel(f"{name} is not loaded")

    def keep(self, name: str, seconds: float | None) -> None:
        self.told.append(("keep", name, seconds))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    file = tmp_path / "tiny.gguf"
    file.write_bytes(MODEL)
    pull(str(file), store=folder, told=lambda step: None, env={})
    return folder


def official(url: str, token: str = "") -> ollama.AsyncClient:
    return ollama.AsyncClient(host=url, headers={"authorization": f"Bearer {token}"} if token else {})


async def test_what_is_in_the_store_and_what_may_be_asked_for(tmp_path: Path, store: Path) -> None:
    """tags: the store's models with size and digest, then the virtual ones, so that a client can choose `auto`."""
    async with edge(tmp_path, Shelf(store), EchoAnswer("cloud")) as it, official(it.url) as client:
        models = {one.model: one for one in (await client.list()).models}

    assert list(models) == ["tiny", "auto", "edge", "cloud", "small", "large"]
    tiny = models["tiny"]
    assert (tiny.size, tiny.digest) == (len(MODEL), installed(store)[0].manifest.sha256)
    assert tiny.details is not None
    assert (tiny.details.family, tiny.details.quantization_level, tiny.details.format) == ("llama", "Q4_K_M", "gguf")


async def test_what_is_known_of_a_model(tmp_path: Path, store: Path) -> None:
    """show: its template, licence, sizes; of a virtual one its context; an unknown one is a 404, also a path."""
    async with edge(tmp_path, Shelf(store)) as it, official(it.url) as client:
        tiny, auto = await client.show("tiny"), await client.show("auto")
        for unknown in ("zap", "../store/tiny", "/etc/passwd", "a" * 5000):
            with pytest.raises(ollama.ResponseError) as raised:
                await client.show(unknown)
            assert raised.value.status_code == 404

    assert (tiny.template, tiny.license) == (TEMPLATE, "mit")
    assert tiny.modelinfo is not None
    assert tiny.modelinfo["llama.context_length"] == 64
    assert auto.modelinfo == {"general.context_length": 2048}


async def test_what_is_in_memory(tmp_path: Path, store: Path) -> None:
    """ps: name, size, context, and when it goes; what stays has a date far away."""
    async with edge(tmp_path, Shelf(store)) as it, official(it.url) as client:
        small, tiny = (await client.ps()).models

    assert (small.name, small.size, small.context_length) == ("small", 2, 2048)
    assert tiny.expires_at == datetime(2030, 1, 1, tzinfo=UTC)
    assert small.expires_at is not None
    assert small.expires_at.year == 9999
    assert tiny.digest == installed(store)[0].manifest.sha256


async def test_how_long_a_model_stays_is_told(tmp_path: Path, store: Path) -> None:
    """keep_alive in seconds or as a duration, negative for ever; an empty request loads, with 0 it unloads."""
    shelf = Shelf(store)
    async with edge(tmp_path, shelf) as it, official(it.url) as client:
        for given in ("1m30s", 5, -1, "500ms"):
            await client.generate("small", "x", keep_alive=given)
        await client.generate("auto")
        await client.generate("small", keep_alive=0)
        for bad in ("soon", "5 m", "1e309", "9" * 400):
            with pytest.raises(ollama.ResponseError, match="keep_alive"):
                await client.generate("small", "x", keep_alive=bad)

    keeps = [("keep", "small", seconds) for seconds in (90.0, 5.0, None, 0.5)]
    assert shelf.told == [*keeps, ("load", "small", None), ("keep", "small", 0.0), ("stop", "small", None)]


async def test_a_pull_tells_its_progress(tmp_path: Path, store: Path) -> None:
    """Streamed with bytes done and in all, then success; in one piece only that; the model is in the store."""
    shelf = Shelf(store)
    with serving(Origin(MODEL)) as origin:
        async with edge(tmp_path, shelf) as it, official(it.url, TOKEN) as client:
            steps = [step async for step in await client.pull(f"{origin}/other.gguf", stream=True)]
            done = await client.pull(f"{origin}/third.gguf")

    assert (steps[-1].status, done.status) == ("success", "success")
    assert all(step.completed is None or step.completed <= len(MODEL) for step in steps)
    assert [one.manifest.name for one in installed(store)] == ["other", "third", "tiny"]


@pytest.mark.parametrize("token", ["", "wrong"])
async def test_a_pull_is_administration(tmp_path: Path, store: Path, token: str) -> None:
    """S-07: without the token nothing is fetched, and the error says which one it is."""
    origin = Origin(MODEL)
    with serving(origin) as url:
        async with edge(tmp_path, Shelf(store)) as it, official(it.url, token) as client:
            with pytest.raises(ollama.ResponseError, match=r"admin\.token") as raised:
                await client.pull(f"{url}/other.gguf")

    assert raised.value.status_code == 401
    assert not origin.seen


@pytest.mark.parametrize(
    ("source", "status"),
    [("zap", 404), ("./tiny.gguf", 403), ("/etc/passwd", 403), ("http://example.com/x.gguf", 400), ("", 400)],
)
async def test_what_cannot_be_pulled(tmp_path: Path, store: Path, source: str, status: int) -> None:
    """S-12: unknown names, paths of this device, plain http: refused with a status, before anything is fetched."""
    async with edge(tmp_path, Shelf(store)) as it, it.http() as http:
        headers = {"authorization": f"Bearer {TOKEN}"}
        reply = await http.post("/api/pull", json={"model": source}, headers=headers)

    assert reply.status_code in (status, 404)
    assert isinstance(reply.json()["error"], str)
    assert [one.manifest.name for one in installed(store)] == ["tiny"]


async def test_a_pull_that_fails_says_so(tmp_path: Path, store: Path) -> None:
    """A source that has no such file: the client's own error, with the reason."""
    origin = Origin(MODEL)
    origin.statuses = [404]
    with serving(origin) as url:
        async with edge(tmp_path, Shelf(store)) as it, official(it.url, TOKEN) as client:
            with pytest.raises(ollama.ResponseError):
                async for _ in await client.pull(f"{url}/gone.gguf", stream=True):
                    await asyncio.sleep(0)

    assert [one.manifest.name for one in installed(store)] == ["tiny"]
