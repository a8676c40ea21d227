"""Administration: everything under /admin needs a credential, also what is not there. The rest: `policies`, `fleet`,
`figures`.

GET  /admin/status   who answered, the device, the link, the policy in force
POST /admin/reload   read the policy and the settings again, now; says which settings wait for a restart
GET  /admin/models   the models in memory, and what a prompt would take in each and in the cloud
POST /admin/models/NAME/load and /stop   have one there, or no more
POST /admin/cache/clear   forget all answers, in every layer
"""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.convertors import Convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, compile_path

from edge_agent.api.administrators import Administrators, AdminRoute, Handler
from edge_agent.api.figures import FigureAdministration
from edge_agent.api.fleet import fleet_route
from edge_agent.api.models import model_routes
from edge_agent.api.policies import PolicyAdministration
from edge_agent.daemon import Daemon, health
from edge_agent.policy_file import Snapshot
from shared.administrators import Administrator
from shared.errors import MethodNotAllowed, NotFound

Pattern = tuple[tuple[re.Pattern[str], str, dict[str, Convertor[Any]]], AdminRoute]

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def add_admin(
    app: FastAPI,
    daemon: Daemon,
    *,
    token: str,
    keys_file: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """One endpoint in front of all of /admin: who asks is checked before the path is looked at."""
    started, administrators = clock(), Administrators(token, keys_file)

    async def status(_: Request, __: Administrator) -> dict[str, Any]:
        return {"uptime_s": round(clock() - started, 3), **_status(daemon)}

    async def reload(_: Request, __: Administrator) -> dict[str, Any]:
        changes = await daemon.reload()
        return {
            "policy": _policy(daemon.policy.current, daemon.policy.failures),
            "settings": dataclasses.asdict(changes),
        }

    async def clear(_: Request, __: Administrator) -> dict[str, Any]:
        if daemon.cache is not None:
            await daemon.cache.clear()
        return {"cache": None if daemon.cache is None else daemon.cache.stats()}

    routes = [
        AdminRoute("GET", "/admin/status", "read", status),
        AdminRoute("POST", "/admin/reload", "activate", reload),
        AdminRoute("POST", "/admin/cache/clear", "activate", clear),
        *model_routes(daemon),
        *PolicyAdministration(daemon).routes(),
        fleet_route(daemon),
        *FigureAdministration(daemon).routes(),
    ]
    patterns = [(compile_path(route.path), route) for route in routes]

    async def admin(request: Request) -> Response:
        who = administrators.who(request.headers)
        handler, request.scope["path_params"] = _found(patterns, request, who)
        return JSONResponse(await handler(request, who), headers={"cache-control": "no-store"})

    for path in ("/admin", "/admin/{rest:path}"):
        app.router.routes.append(Route(path, admin, methods=list(METHODS)))


def _found(patterns: list[Pattern], request: Request, who: Administrator) -> tuple[Handler, dict[str, Any]]:
    """What this request asks for, and the names in its path. Raises NotFound, MethodNotAllowed or Forbidden."""
    takes = set()
    for (regex, _, convertors), route in patterns:
        if (match := regex.fullmatch(request.scope["path"])) is None:
            continue
        takes.add(route.method)
        if route.method == request.method:
            who.require(route.role, "edge")
            return route.handler, {name: convertors[name].convert(value) for name, value in match.groupdict().items()}
    if takes:
        raise MethodNotAllowed(f"this path takes {' and '.join(sorted(takes))}", source="edge")
    raise NotFound("no such path", source="edge")


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
        "spent": _spent(daemon),
        "classes": daemon.experience.attainment(daemon.policy.policy.targets),
        "link": link,
        "cache": None if daemon.cache is None else daemon.cache.stats(),
        "policy": _policy(daemon.policy.current, daemon.policy.failures),
    }


def _spent(daemon: Daemon) -> dict[str, Any] | None:
    """None while the policy has no prices."""
    price = daemon.policy.policy.price
    return None if price is None else {"currency": price.currency, **daemon.experience.spending.stats()}


def _policy(snapshot: Snapshot, failures: int) -> dict[str, Any]:
    return {
        "name": snapshot.name,
        "mode": snapshot.policy.mode,
        "rules": [rule.name for rule in snapshot.policy.rules],
        "sha256": snapshot.sha256,
        "reload_failures": failures,
    }
