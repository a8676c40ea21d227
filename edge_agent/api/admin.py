"""Administration: everything under /admin needs the token, also what is not there.

GET  /admin/status   who answered, the device, the link, the policy in force
POST /admin/reload   read the policy and the settings again, now; says which settings wait for a restart
GET  /admin/models   the models in memory; POST /admin/models/NAME/load and /stop: have one there, or no more
POST /admin/cache/clear   forget all answers, in every layer
"""

import dataclasses
import hmac
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge_agent.api.credentials import bearer
from edge_agent.api.models import Handler, model_handler
from edge_agent.daemon import Daemon, health
from edge_agent.policy_file import Snapshot
from shared.errors import MethodNotAllowed, NotFound, Unauthorized

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def add_admin(app: FastAPI, daemon: Daemon, *, token: str, clock: Callable[[], float] = time.monotonic) -> None:
    """One endpoint in front of all of /admin: the token is checked before the path is looked at."""
    started = clock()

    async def status() -> dict[str, Any]:
        return {"uptime_s": round(clock() - started, 3), **_status(daemon)}

    async def reload() -> dict[str, Any]:
        changes = await daemon.reload()
        return {
            "policy": _policy(daemon.policy.current, daemon.policy.failures),
            "settings": dataclasses.asdict(changes),
        }

    async def clear() -> dict[str, Any]:
        if daemon.cache is not None:
            await daemon.cache.clear()
        return {"cache": None if daemon.cache is None else daemon.cache.stats()}

    handlers: dict[str, tuple[str, Handler]] = {
        "/admin/status": ("GET", status),
        "/admin/reload": ("POST", reload),
        "/admin/cache/clear": ("POST", clear),
    }

    async def admin(request: Request) -> Response:
        _check(request.headers, token)
        found = handlers.get(request.scope["path"]) or model_handler(daemon.local, request.scope["path"])
        if found is None:
            raise NotFound("no such path", source="edge")
        method, handler = found
        if request.method != method:
            raise MethodNotAllowed(f"this path takes {method}", source="edge")
        return JSONResponse(await handler(), headers={"cache-control": "no-store"})

    for path in ("/admin", "/admin/{rest:path}"):
        app.router.routes.append(Route(path, admin, methods=list(METHODS)))


def _check(headers: Mapping[str, str], token: str) -> None:
    if not hmac.compare_digest(bearer(headers).encode("utf-8", "surrogateescape"), token.encode()):
        raise Unauthorized("administration needs the token in the state folder's admin.token", source="edge")


def _status(daemon: Daemon) -> dict[str, Any]:
    link, runtime = dataclasses.asdict(daemon.agent.link()), daemon.local.reading()
    if daemon.offload is not None:
        link["breaker"] = daemon.offload.breaker_state()
    return {
        **health(daemon),
        "running": daemon.intake.running,
        "routes": daemon.counts.by_target(),
        "failovers": daemon.counts.failovers,
        "device": {
            **dataclasses.asdict(daemon.device.reading()),
            "restarts": runtime.restarts,
            "quarantined": runtime.quarantined,
        },
        "predictions": daemon.experience.accuracy(),
        "link": link,
        "cache": None if daemon.cache is None else daemon.cache.stats(),
        "policy": _policy(daemon.policy.current, daemon.policy.failures),
    }


def _policy(snapshot: Snapshot, failures: int) -> dict[str, Any]:
    return {
        "name": snapshot.name,
        "mode": snapshot.policy.mode,
        "rules": [rule.name for rule in snapshot.policy.rules],
        "sha256": snapshot.sha256,
        "reload_failures": failures,
    }
