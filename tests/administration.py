"""A running daemon with all of its administration: a history, a journal, a console; both sides in the test's hands."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from edge_sides import HERE, THERE, Local, Remote, Turns
from serving import served

from edge_agent.api.admin import add_admin
from edge_agent.api.console import add_console
from edge_agent.api.openai import openai_app
from edge_agent.daemon import Daemon, put_together
from edge_agent.journal import Journal
from edge_agent.policies.center import PolicyCenter
from edge_agent.policies.fleet import FleetFollower
from edge_agent.policies.history import History
from edge_agent.policies.signer import Signer
from shared.guard import Guard
from shared.keys import new_key

TOKEN = "t0ken-of-this-test"
CLOUD = "mode: prefer_cloud\n"


class Administration:
    """A running daemon with a history and a journal, and a client for each role."""

    def __init__(self, daemon: Daemon, url: str, folder: Path) -> None:
        self.daemon, self.url, self._folder = daemon, url, folder
        self.admin = self.client(TOKEN)

    def client(self, key: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60)

    def someone(self, owner: str) -> httpx.AsyncClient:
        return self.client(new_key(self._folder / "admin.keys", owner, now=datetime.now(UTC)))

    async def get(self, path: str) -> dict[str, Any]:
        reply = await self.admin.get(path)
        assert reply.status_code == 200, reply.text
        body: dict[str, Any] = reply.json()
        return body

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        reply = await self.admin.post(path, json=body)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    async def ask(self, text: str = "Hello", model: str = "auto") -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        return await self.admin.post("/v1/chat/completions", json=body)


@asynccontextmanager
async def administration(
    folder: Path, *, history: bool = True, fleet: Ed25519PublicKey | None = None
) -> AsyncIterator[Administration]:
    """`fleet`: the key of the fleet that the device follows."""
    kept = History(folder / "policies.db", Signer(b"k" * 32)) if history else None
    journal = Journal(folder / "journal.db") if history else None
    center = PolicyCenter(None, kept)
    follower = None if fleet is None else FleetFollower(center, fleet, edge="a-device", group="kiosk")
    daemon = put_together(Local(Turns(HERE)), Remote(Turns(THERE)), center, journal, follower=follower)
    app = openai_app(daemon, keys=None, guard=Guard())
    add_admin(app, daemon, token=TOKEN, keys_file=folder / "admin.keys")
    add_console(app)
    async with served(app) as port:
        running = Administration(daemon, f"http://127.0.0.1:{port}", folder)
        async with running.admin:
            yield running
    for store in (kept, journal):
        if store is not None:
            store.close()
