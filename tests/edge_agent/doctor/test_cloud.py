import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from fakes import EchoAnswer
from serving import served
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from cloud_engine.gateway.socket import SocketEndpoint
from edge_agent.doctor.cloud import cloud
from edge_agent.doctor.findings import Finding
from edge_agent.service import cloud_backend
from edge_agent.settings import EdgeSettings
from shared.binding import Tls
from shared.errors import Unauthorized
from shared.executions import Rules
from shared.schemas import ModelCard

KEY = "cw-test-secret"
FAR_FUTURE = 2.5e11


def authenticate(headers: Any) -> str:
    if headers.get("authorization") != f"Bearer {KEY}":
        raise Unauthorized("bad key")
    return "tenant"


@asynccontextmanager
async def site(tls: Tls | None = None) -> AsyncIterator[int]:
    """A cloud as the gateway serves it."""
    rules = Rules(models=(ModelCard(id="large", context_length=8192),))
    endpoint = SocketEndpoint(answer_for=lambda _: EchoAnswer(), authenticate=authenticate, rules=rules)

    async def health(_: object) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    app = Starlette(routes=[endpoint.route(), Route("/health", health)])
    async with served(app, drain=endpoint.aclose, tls=tls) as port:
        yield port


def settings(folder: Path, url: str, key: str = KEY, **values: Any) -> EdgeSettings:
    path = folder / "edge.key"
    path.touch(0o600)
    path.write_text(key)
    return EdgeSettings(cloud=url, key_file=path, **values)


async def found(given: EdgeSettings, now: Callable[[], float] = time.time) -> dict[str, Finding]:
    findings = await asyncio.to_thread(lambda: list(cloud(given, cloud_backend, now)))
    return {finding.check: finding for finding in findings}


async def test_a_cloud_that_takes_us(tmp_path: Path) -> None:
    """Connected, the key accepted, its model named, its clock ours."""
    async with site() as port:
        said = await found(settings(tmp_path, f"ws://127.0.0.1:{port}"))

    assert {check: finding.status for check, finding in said.items()} == {"cloud": "OK", "clock": "OK"}
    assert "large" in said["cloud"].said


async def test_a_key_it_does_not_know(tmp_path: Path) -> None:
    """FAIL, with where keys come from; the key is not shown."""
    async with site() as port:
        said = await found(settings(tmp_path, f"ws://127.0.0.1:{port}", "cw-wrong"))

    assert said["cloud"].status == "FAIL"
    assert "keys new" in said["cloud"].todo
    assert "cw-wrong" not in str(said)


async def test_nobody_there(tmp_path: Path) -> None:
    """FAIL; local answers need none."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"ws://127.0.0.1:{nobody.getsockname()[1]}"
    said = await found(settings(tmp_path, url))

    assert said["cloud"].status == "FAIL"
    assert "local answers need none" in said["cloud"].todo


@pytest.mark.parametrize("ahead", [-3600.0, 120.0])
async def test_a_clock_that_is_wrong(tmp_path: Path, ahead: float) -> None:
    """WARN, by how much."""
    async with site() as port:
        said = await found(settings(tmp_path, f"ws://127.0.0.1:{port}"), lambda: time.time() + ahead)

    assert said["clock"].status == "WARN"
    assert "NTP" in said["clock"].todo


async def test_a_certificate_that_is_trusted_or_not(tmp_path: Path) -> None:
    """By its authority: OK with the days it holds. Without: FAIL, and no word of going on all the same."""
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost")
    leaf.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    leaf.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with site(Tls(tmp_path / "cert.pem", tmp_path / "key.pem")) as port:
        url = f"wss://localhost:{port}"
        trusted = await found(settings(tmp_path, url, cloud_ca=tmp_path / "ca.pem"))
        strange = await found(settings(tmp_path, url))
        late = await found(settings(tmp_path, url, cloud_ca=tmp_path / "ca.pem"), lambda: FAR_FUTURE)

    assert (trusted["cloud"].status, trusted["tls"].status) == ("OK", "OK")
    assert strange["cloud"].status == "FAIL"
    assert "cloud_ca" in strange["cloud"].todo
    assert late["tls"].status == "WARN"


async def test_switched_off_or_not_wanted_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CAUSEWAY_NO_CLOUD, no_cloud, none configured: OK, and nobody was connected to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}"
        none, setting = await found(EdgeSettings()), await found(settings(tmp_path, url, no_cloud=True))
        monkeypatch.setenv("CAUSEWAY_NO_CLOUD", "1")
        switch = await found(settings(tmp_path, url))
        with pytest.raises(BlockingIOError):
            listener.accept()

    assert [one["cloud"].status for one in (none, setting, switch)] == ["OK"] * 3
    assert "CAUSEWAY_NO_CLOUD" in switch["cloud"].said
