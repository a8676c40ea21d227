"""All surfaces of a running edge, over scripted sides."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from edge_sides import daemon_over, policy_file
from fastapi import FastAPI
from serving import served

from edge_agent.api.admin import add_admin
from edge_agent.api.administrators import Administrators
from edge_agent.api.app import edge_app
from edge_agent.api.openai import Keyring
from edge_agent.daemon import Daemon
from shared.guard import Guard
from shared.schemas import Answer

TOKEN = "t0ken-of-this-test"
JSON = {"content-type": "application/json"}
TOOL = {
    "name": "weather",
    "description": "The weather somewhere",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


class Edge:
    """A running edge over scripted sides."""

    def __init__(self, daemon: Daemon, app: FastAPI, port: int) -> None:
        self.daemon = daemon
        self.app = app
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=60, headers=JSON)


@asynccontextmanager
async def edge(
    folder: Path,
    local: Answer | None = None,
    cloud: Answer | None = None,
    *,
    policy: str = "mode: prefer_edge",
    keys: Keyring | None = None,
    embedder: Any = None,
) -> AsyncIterator[Edge]:
    daemon = replace(daemon_over(local, cloud, policy_file(folder, policy)), embedder=embedder)
    app = edge_app(daemon, keys=keys, guard=Guard(), administrators=Administrators(TOKEN))
    add_admin(app, daemon, token=TOKEN)
    async with served(app) as port:
        yield Edge(daemon, app, port)
