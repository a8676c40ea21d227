"""What this device has of its fleet's policies.

GET /admin/fleet   what the cloud sent last and when it last answered, what is in force, what was refused and why
"""

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request

from edge_agent.api.administrators import AdminRoute
from edge_agent.daemon import Daemon
from edge_agent.policies.center import FLEET
from edge_agent.policies.fleet import FleetFollower, LoosensPrivacy
from shared.administrators import Administrator

LISTED = 50


def fleet_route(daemon: Daemon) -> AdminRoute:
    async def fleet(_: Request, __: Administrator) -> dict[str, Any]:
        follower = daemon.follower
        if follower is None:
            return {"fleet": None}
        link, acts = daemon.agent.link(), await asyncio.to_thread(daemon.policy.history.acts)
        refusals = [act for act in acts if (act.who, act.action) == (FLEET, "refuse")]
        return {
            "fleet": {
                **_state(follower),
                "connected": link.configured and link.connected,
                "refusals": [{"at": act.at, "why": act.why} for act in refusals[:LISTED]],
            }
        }

    return AdminRoute("GET", "/admin/fleet", "read", fleet)


def _state(follower: FleetFollower) -> dict[str, Any]:
    """Versions are the fleet's, 0 is none. `stricter`: the device's own policy demands more than the refused one."""
    state = follower.state()
    return {
        **msgspec.structs.asdict(state),
        "offered": follower.offered_version or None,
        "answered_at": follower.answered_at or None,
        "stricter": state.code == LoosensPrivacy.code,
    }
