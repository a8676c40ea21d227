from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from edge_sides import HERE, THERE, Turns, daemon_over, policy_file
from serving import served

from edge_agent.api.admin import add_admin
from edge_agent.api.openai import openai_app
from edge_agent.daemon import Daemon
from shared.guard import Guard

TOKEN = "t0ken-of-this-test"
GOOD = {"authorization": f"Bearer {TOKEN}"}
JSON = {"content-type": "application/json"}


@asynccontextmanager
async def edge(folder: Path, policy: str = "mode: prefer_edge") -> AsyncIterator[tuple[Daemon, httpx.AsyncClient]]:
    daemon = daemon_over(Turns(HERE), Turns(THERE), policy_file(folder, policy))
    app = openai_app(daemon, keys=None, guard=Guard())
    add_admin(app, daemon, token=TOKEN)
    async with served(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield daemon, client


CREDENTIALS = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer wrong"},
    {"authorization": f"Bearer {TOKEN}x"},
    {"authorization": f"Bearer {TOKEN[:-1]}"},
    {"authorization": f"Basic {TOKEN}"},
    {"authorization": TOKEN},
    {"authorization": b"Bearer \xe9\xff"},
    {"x-api-key": TOKEN},
    {"cookie": f"token={TOKEN}"},
]
PATHS = [
    "/admin",
    "/admin/",
    "/admin/status",
    "/admin/reload",
    "/admin/nothing",
    "/admin/models",
    "/admin/models/small/stop",
    "/admin/status/../reload",
    "/admin//status",
]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"])
async def test_nothing_of_administration_without_the_token(tmp_path: Path, method: str) -> None:
    """Every path, there or not, by every method: 401, and nothing is done."""
    async with edge(tmp_path) as (daemon, client):
        (tmp_path / "policy.yaml").write_text("mode: only_edge")
        replies = [
            await client.request(method, path, headers={**JSON, **credential})  # type: ignore[dict-item]
            for path in PATHS
            for credential in CREDENTIALS
        ]
        query = await client.request(method, f"/admin/status?token={TOKEN}", headers=JSON)

        assert daemon.policy.policy.mode == "prefer_edge"
    assert {reply.status_code for reply in [*replies, query]} == {401}
    assert not any(TOKEN in reply.text for reply in replies)


async def test_with_the_token_only_what_exists(tmp_path: Path) -> None:
    """Unknown paths are 404, wrong methods 405."""
    async with edge(tmp_path) as (_, client):
        statuses = {
            (method, path): (await client.request(method, path, headers=GOOD | JSON)).status_code
            for method, path in [
                ("GET", "/admin"),
                ("GET", "/admin/nothing"),
                ("POST", "/admin/status"),
                ("GET", "/admin/reload"),
                ("GET", "/admin/status"),
                ("POST", "/admin/reload"),
            ]
        }

    assert list(statuses.values()) == [404, 404, 405, 405, 200, 200]


async def test_foreign_pages_cannot_administer(tmp_path: Path) -> None:
    """Host and Origin are checked before the token is."""
    async with edge(tmp_path) as (_, client):
        for extra in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
            reply = await client.post("/admin/reload", headers={**GOOD, **JSON, **extra})
            assert reply.status_code == 403
        simple = await client.post("/admin/reload", headers={**GOOD, "content-type": "text/plain"})

    assert simple.status_code == 415


async def test_status_tells_who_answered_and_what_is_in_force(tmp_path: Path) -> None:
    """Counts, device, link, breaker, policy with its hash; no prompt and no secret."""
    async with edge(tmp_path, "mode: prefer_edge\nrules: [{name: a, when: {turns: 9}, target: cloud}]") as (
        daemon,
        client,
    ):
        for model in ("edge", "edge", "cloud", "nobody"):
            body = {"model": model, "messages": [{"role": "user", "content": "zebra-canary"}]}
            await client.post("/v1/chat/completions", json=body)
        reply = await client.get("/admin/status", headers=GOOD)

    status: dict[str, Any] = reply.json()
    assert status["status"] == "ok"
    assert status["routes"] == {"edge": {"done": 2}, "cloud": {"done": 1}, "none": {"error": 1}}
    assert (status["device"]["model"], status["device"]["slots"]) == ("small", 4)
    assert (status["link"]["model"], status["link"]["breaker"], status["link"]["connected"]) == (
        "large",
        "closed",
        True,
    )
    assert status["policy"]["sha256"] == daemon.policy.current.sha256
    assert (status["policy"]["mode"], status["policy"]["rules"]) == ("prefer_edge", ["a"])
    assert reply.headers["cache-control"] == "no-store"
    assert "zebra" not in reply.text
    assert TOKEN not in reply.text


async def test_reload_takes_a_good_file_and_names_the_fault_of_a_bad_one(tmp_path: Path) -> None:
    """A bad file is a 400 with line and field, and the policy in force stays."""
    async with edge(tmp_path) as (daemon, client):
        (tmp_path / "policy.yaml").write_text("mode: only_edge")
        good = await client.post("/admin/reload", headers=GOOD | JSON)
        (tmp_path / "policy.yaml").write_text("mode: only_edge\nrulez: []")
        bad = await client.post("/admin/reload", headers=GOOD | JSON)

        assert daemon.policy.policy.mode == "only_edge"
    assert good.json()["policy"]["mode"] == "only_edge"
    assert bad.status_code == 400
    assert bad.json()["error"]["code"] == "invalid_policy"
    assert bad.json()["error"]["param"] == "rulez"
    assert "policy.yaml:2: rulez" in bad.json()["error"]["message"]


async def test_looking_wakes_nothing(tmp_path: Path) -> None:
    """Health, metrics, models and status count no token and ask no model."""
    async with edge(tmp_path) as (daemon, client):
        for path in ("/health", "/metrics", "/v1/models", "/admin/status"):
            assert (await client.get(path, headers=GOOD)).status_code == 200

        assert daemon.local.counted == 0  # type: ignore[attr-defined]
        assert daemon.local.inner.begun == 0  # type: ignore[attr-defined]
