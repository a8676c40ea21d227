import asyncio
import os
import signal
import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import trustme
from bad_input import CHAT, chat
from edge_sides import HERE, Local
from fakes import ScriptedAnswer
from model_origin import model_bytes
from waiting import HANG_S

from edge_agent import run as module
from edge_agent.run import run
from edge_agent.service import background
from edge_agent.settings import EdgeSettings
from shared.config import InvalidSettings
from shared.keys import new_key

JSON = {"content-type": "application/json"}


class Llama(Local):
    """A local backend as `run` builds it, with a script for a model."""

    made: ClassVar["list[Llama]"] = []

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(ScriptedAnswer(HERE[0], asyncio.Event(), *HERE[1:]))
        self.path, self.options, self.started = path, options, False
        Llama.made.append(self)

    async def start(self) -> None:
        self.started = True

    @property
    def script(self) -> ScriptedAnswer:
        return self.inner  # type: ignore[return-value]


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Llama]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(module, "LlamaBackend", Llama)
    Llama.made = []
    return Llama


def settings(folder: Path, **values: Any) -> EdgeSettings:
    model = folder / "m.gguf"
    model.write_bytes(model_bytes(100))
    return EdgeSettings(model=str(model), port=0, state_dir=folder / "state", **values)


async def url_of(capsys: pytest.CaptureFixture[str], task: asyncio.Task[None]) -> str:
    async with asyncio.timeout(HANG_S):
        while not task.done():
            out = capsys.readouterr().out
            if "listening on " in out:
                return out.split("listening on ")[1].strip()
            await asyncio.sleep(0.01)
    task.result()
    raise AssertionError("ended without listening")


async def test_serves_until_sigterm_and_drains(
    tmp_path: Path, llama: type[Llama], capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints where it listens; on SIGTERM the running answer is finished, then everything is closed."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("mode: prefer_edge")
    key = tmp_path / "edge.key"
    key.touch(0o600)
    key.write_text("cw_key")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"ws://127.0.0.1:{nobody.getsockname()[1]}"
    daemon = asyncio.create_task(run(settings(tmp_path, policy=policy, cloud=address, key_file=key)))
    url = await url_of(capsys, daemon)
    side = llama.made[0]
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        health = await client.get("/health")
        asked = asyncio.create_task(client.post(CHAT, content=chat(), headers=JSON))
        await asyncio.wait_for(side.script.begun.wait(), HANG_S)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        assert not daemon.done()
        side.script.script[1].set()  # type: ignore[union-attr]
        answered = await asked
    await asyncio.wait_for(daemon, HANG_S)

    assert health.json() == {"status": "ok", "edge": "ready", "cloud": "disconnected"}
    assert answered.json()["choices"][0]["message"]["content"] == "from here"
    assert side.started
    assert side.closed
    assert (tmp_path / "state" / "admin.token").stat().st_mode & 0o777 == 0o600


async def test_an_address_in_use_does_not_start_and_leaves_nothing_open(tmp_path: Path, llama: type[Llama]) -> None:
    """The error names the port, and the model that was loaded is closed again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = settings(tmp_path).model_copy(update={"port": taken.getsockname()[1]})
        with pytest.raises(InvalidSettings) as error:
            await run(busy)

    assert error.value.param == "port"
    assert llama.made[0].closed


async def test_with_tls_and_keys_it_speaks_https_to_whoever_has_a_key(
    tmp_path: Path, llama: type[Llama], capsys: pytest.CaptureFixture[str]
) -> None:
    """What a bind beyond loopback needs, here on loopback: a certificate that clients can check, and a key."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    key = new_key(tmp_path / "keys", "client", now=datetime.now(UTC))
    secured = settings(tmp_path, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem", keys=tmp_path / "keys")
    daemon = asyncio.create_task(run(secured))
    url = await url_of(capsys, daemon)
    async with httpx.AsyncClient(base_url=url, timeout=60, verify=trust) as client:
        without = await client.get("/v1/models")
        models = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(daemon, HANG_S)

    assert url.startswith("https://")
    assert without.status_code == 401
    assert [model["id"] for model in models.json()["data"]] == ["auto", "edge", "small"]


async def test_options_reach_the_local_model(tmp_path: Path, llama: type[Llama]) -> None:
    """Slots, context, threads, queue and what may be kept of prompts are what was set."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = settings(tmp_path, slots=3, context=512, threads=2, queue=9, prefix_memory_mb=1, prefix_disk_mb=2)
        with pytest.raises(InvalidSettings):
            await run(given.model_copy(update={"port": taken.getsockname()[1]}))

    assert llama.made[0].path == tmp_path / "m.gguf"
    assert llama.made[0].options == {
        "slots": 3,
        "context": 512,
        "threads": 2,
        "queue": 9,
        "prefix_bytes": 1 << 20,
        "saved": tmp_path / "state" / "prefixes",
        "saved_bytes": 2 << 20,
        "context_shift": False,
        "spare": None,
    }


async def test_a_watch_that_breaks_does_not_end_the_daemon() -> None:
    """It is logged; the others go on and are ended with the body."""
    ended = asyncio.Event()

    async def broken() -> None:
        raise ValueError("a bug")

    async def going_on() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with background(broken, going_on):
        await asyncio.sleep(0.01)
        assert not ended.is_set()

    assert ended.is_set()
