"""All of the daemon but the model: opened, put together, served until it stops, closed."""

import asyncio
import os
import sqlite3
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import structlog

from edge_agent.api.access import Access
from edge_agent.api.admin import add_admin
from edge_agent.api.administrators import KEYS_FILE, Administrators
from edge_agent.api.app import edge_app
from edge_agent.api.console import add_console
from edge_agent.api.credentials import admin_token, client_token
from edge_agent.backends.cloud import CloudBackend
from edge_agent.cache.layers import open_cache
from edge_agent.daemon import put_together
from edge_agent.embedder import Embedder
from edge_agent.instance import Held
from edge_agent.journal import Journal
from edge_agent.models.library import Library
from edge_agent.policies.center import PolicyCenter
from edge_agent.policies.fleet import FleetFollower
from edge_agent.policies.history import History
from edge_agent.policies.signer import Signer, device_signer
from edge_agent.reload import LiveSettings, on_hangup
from edge_agent.settings import EdgeSettings
from edge_agent.spending import Spending
from shared.config import InvalidSettings, read_secret
from shared.guard import Guard
from shared.keys import Keys
from shared.models import default_store
from shared.serving import announce, serve
from shared.signing import public_key


async def serve_with(
    local: Library, loading: asyncio.Task[None], settings: EdgeSettings, live: LiveSettings, state: Path, held: Held
) -> None:
    """Serve what `local` answers once `loading` is over, until SIGTERM or SIGINT."""
    signer = device_signer(state / "audit.key")
    history = _history(state, signer)
    policy = PolicyCenter(settings.policy, history)
    keys = Keys(settings.keys, source="edge") if settings.keys else None
    token = admin_token(state)
    access = Access(keys, client_token(state) if settings.require_key else None)
    async with AsyncExitStack() as closing:
        if history is not None:
            closing.callback(history.close)
        follower = _follower(settings, policy, signer.name) if history is not None else None
        cloud = cloud_backend(settings, follower)
        if cloud is not None:
            closing.push_async_callback(cloud.aclose)
            cloud.start()  # connects while the model loads
        spending = Spending.remembered(state / "journal.db")
        journal = Journal(state / "journal.db")
        closing.callback(journal.close)
        embedder = Embedder.named(
            settings.embedding_model, default_store(os.environ, Path.home()), keep_s=settings.keep_s
        )
        closing.push_async_callback(embedder.aclose)
        cache = await open_cache(settings, state, embedder)
        if cache is not None:
            closing.push_async_callback(cache.aclose)
        daemon = put_together(local, cloud, policy, journal, live, embedder, cache, spending, follower)
        administrators = Administrators(token, state / KEYS_FILE)
        app = edge_app(daemon, keys=access, guard=_guard(settings), administrators=administrators)
        add_admin(app, daemon, token=token, keys_file=state / KEYS_FILE)
        add_console(app)
        await loading
        closing.enter_context(on_hangup(daemon.reload))
        await closing.enter_async_context(background(daemon.device.watch, policy.watch, live.watch, local.watch))
        if follower is not None:
            await closing.enter_async_context(background(follower.watch))
        await serve(
            app,
            settings.host,
            settings.port,
            on_listening=lambda url: _announce(url, held),
            tls=settings.tls,
            drain=daemon.intake.drain,
            drain_s=settings.drain_s,
        )


def _announce(url: str, held: Held) -> None:
    held.say(url)
    announce(url)


def _history(state: Path, signer: Signer) -> History | None:
    """None where the state folder cannot be written: then the policy's file alone decides, and no fleet."""
    try:
        return History(state / "policies.db", signer)
    except (OSError, sqlite3.Error) as error:
        structlog.get_logger("causeway.policy").error("no history of policies", error=str(error))
        return None


def _follower(settings: EdgeSettings, policy: PolicyCenter, edge: str) -> FleetFollower | None:
    """Raises InvalidSettings."""
    if settings.fleet_key is None or settings.cloud_in_use is None:
        return None
    key = public_key(settings.fleet_key, "fleet_key")
    return FleetFollower(policy, key, edge=edge, group=settings.fleet_group)


def cloud_backend(settings: EdgeSettings, follower: FleetFollower | None = None) -> CloudBackend | None:
    """What connects to the cloud, not yet connected; None where no cloud is wanted. Raises InvalidSettings."""
    url = settings.cloud_in_use
    if url is None:
        return None
    return CloudBackend(
        url,
        read_secret(settings.key_file, "key_file") if settings.key_file else "",
        resume_ttl=settings.resume_s,
        first_token_timeout=None,  # the policy's limit holds, which a reload may change
        keep_connected=True,
        allow_plaintext=settings.allow_plaintext,
        follower=follower,
        tls=_trust(settings.cloud_ca) if url.startswith("wss:") else None,
    )


def _trust(authorities: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authorities)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSettings(
            f"cloud_ca: {authorities} holds no certificates that can be read", param="cloud_ca"
        ) from error


def _guard(settings: EdgeSettings) -> Guard:
    names = (settings.host, *settings.hosts)
    hosts = frozenset(f"[{name}]" if ":" in name else name.lower() for name in names)
    return Guard(hosts=hosts, origins=frozenset(settings.origins))


@asynccontextmanager
async def background(*watches: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Runs them beside the body. One that breaks is logged and does not take the daemon with it."""
    tasks = [asyncio.create_task(_kept(watch)) for watch in watches]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _kept(watch: Callable[[], Awaitable[None]]) -> None:
    try:
        await watch()
    except Exception as error:
        structlog.get_logger("causeway.edge").error(
            "watch ended", watch=watch.__qualname__, exception=type(error).__name__
        )
