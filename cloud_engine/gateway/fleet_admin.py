"""Administration of the fleet over HTTP, for whom the key file `fleet_admins` names, with the roles of the edge's.

GET  /admin/fleet           read      policies, and per edge which one is in force
POST /admin/fleet/check     propose   {signed}: the text of a signed policy is looked at; nothing is kept
POST /admin/fleet/policies  activate  {signed}: it is published
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloud_engine.gateway.fleet import Fleet, described
from shared.administrators import Administrator, Role, keyholder
from shared.errors import BadRequest
from shared.keys import Keys

LISTED = 1000

Handler = Callable[[Request, Administrator], Awaitable[dict[str, Any]]]


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    signed: str


async def _signed(request: Request) -> bytes:
    try:
        return msgspec.json.decode(await request.body(), type=_Body).signed.encode()
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise BadRequest('the body must be {"signed": TEXT}', param="signed", source="cloud") from None


def fleet_routes(fleet: Fleet, admins: Keys) -> list[Route]:
    async def overview(_: Request, __: Administrator) -> dict[str, Any]:
        return fleet.overview(LISTED)

    async def check(request: Request, _: Administrator) -> dict[str, Any]:
        return described(await asyncio.to_thread(fleet.check, await _signed(request)))

    async def publish(request: Request, who: Administrator) -> dict[str, Any]:
        return described(await fleet.publish(await _signed(request), who.name))

    def route(method: str, path: str, role: Role, handler: Handler) -> Route:
        async def answer(request: Request) -> Response:
            who = keyholder(admins, request.headers)
            who.require(role, "cloud")
            return JSONResponse(await handler(request, who), headers={"cache-control": "no-store"})

        return Route(path, answer, methods=[method])

    return [
        route("GET", "/admin/fleet", "read", overview),
        route("POST", "/admin/fleet/check", "propose", check),
        route("POST", "/admin/fleet/policies", "activate", publish),
    ]
