"""Fleets for tests: a key, policies signed by it, an edge's state with a follower, a cloud that holds policies."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fakes import EchoAnswer, FakeEngine
from prometheus_client import CollectorRegistry
from serving import served

from cloud_engine.gateway.fleet import Fleet
from cloud_engine.gateway.limits import TenantLimits
from cloud_engine.gateway.server import Gateway
from edge_agent.policies.center import PolicyCenter
from edge_agent.policies.fleet import FleetFollower
from edge_agent.policies.history import History
from edge_agent.policies.signer import Signer
from shared.fleet import Terms, sign
from shared.frames import MAX_FRAME, FleetState
from shared.guard import Guard
from shared.keys import Keys
from shared.schemas import ModelCard

KEY = Ed25519PrivateKey.from_private_bytes(b"f" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
CLOUD, EDGE, HERE = "mode: prefer_cloud\n", "mode: prefer_edge\n", "mode: only_edge\n"


def signed(version: int, text: str = CLOUD, key: Ed25519PrivateKey = KEY, **terms: Any) -> bytes:
    return sign(Terms(version=version, **{"why": f"the {version}th", **terms}), text.encode(), key)


@dataclass
class Device:
    """An edge's policies: their centre, history and follower."""

    center: PolicyCenter
    history: History
    follower: FleetFollower

    @property
    def state(self) -> FleetState:
        return self.follower.state()


def device(folder: Path, number: int = 0, *, group: str = "", file: Path | None = None) -> Device:
    signer = Signer(number.to_bytes(32))
    history = History(folder / f"policies{number}.db", signer)
    center = PolicyCenter(file, history)
    return Device(center, history, FleetFollower(center, KEY.public_key(), edge=signer.name, group=group))


@asynccontextmanager
async def watching(follower: FleetFollower) -> AsyncIterator[Callable[[int, bytes], Awaitable[None]]]:
    """`offer(version, signed)` waits until it is judged."""
    task = asyncio.create_task(follower.watch())

    async def offer(version: int, content: bytes) -> None:
        judged = asyncio.Event()
        follower.offered(version, content, judged.set)
        async with asyncio.timeout(30):
            await judged.wait()

    try:
        yield offer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Site:
    """A running gateway with a fleet."""

    def __init__(self, fleet: Fleet, gateway: Gateway, port: int) -> None:
        self.fleet, self.gateway, self.port = fleet, gateway, port

    def publish(self, version: int, text: str = CLOUD, **terms: Any) -> None:
        """As a file of the folder, which `fleet.reload` or the next look finds."""
        (self.fleet.folder / f"{version:06d}.policy").write_bytes(signed(version, text, **terms))


@asynccontextmanager
async def site(folder: Path, admins: Keys | None = None) -> AsyncIterator[Site]:
    folder.mkdir(exist_ok=True)  # noqa: ASYNC240
    fleet = Fleet(folder, KEY.public_key(), admins)
    gateway = Gateway(
        FakeEngine(EchoAnswer("cloud")),
        ModelCard(id="big", context_length=2048),
        keys=None,
        limits=TenantLimits(concurrent=200, connections=200),
        guard=Guard(),
        registry=CollectorRegistry(),
        fleet=fleet,
    )
    async with served(gateway.app, ws_max_size=MAX_FRAME, drain=lambda: gateway.drain(1)) as port:
        yield Site(fleet, gateway, port)
