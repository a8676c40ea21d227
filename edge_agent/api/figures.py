"""Figures for the administrator's page: what a goal should bring, and what was recorded of late.

GET /admin/difficulty   expected quality and cost by the share sent to the cloud; how well the score is calibrated
GET /admin/activity     what the latest decisions come to: by target, rule, tenant and class; times, predictions, cost
"""

import asyncio
import dataclasses
import functools
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from edge_agent.api.administrators import AdminRoute
from edge_agent.daemon import Daemon
from router.activity import mean_call_cost, summarise
from router.assess import shipped_assessments
from router.difficulty import Outlook, shipped_difficulty
from router.observe import outlook
from router.policy import Policy
from router.records import Recorded, read
from shared.administrators import Administrator
from shared.errors import NotFound

LATEST = 5000
CURVE_POINTS = 50


class FigureAdministration:
    """The handlers. What reads files or looks at thousands of records does it beside the event loop."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def routes(self) -> Iterator[AdminRoute]:
        yield AdminRoute("GET", "/admin/difficulty", "read", self.difficulty)
        yield AdminRoute("GET", "/admin/activity", "read", self.activity)

    async def difficulty(self, _: Request, __: Administrator) -> dict[str, Any]:
        return await asyncio.to_thread(lambda: _difficulty(self._daemon.policy.policy, self._recorded()))

    async def activity(self, _: Request, __: Administrator) -> dict[str, Any]:
        if self._daemon.journal is None:
            raise NotFound("decisions are not recorded here", source="edge")
        targets = self._daemon.policy.policy.targets
        summed: dict[str, Any] = await asyncio.to_thread(
            lambda: msgspec.to_builtins(summarise(self._recorded(), targets))
        )
        return summed

    def _recorded(self) -> list[Recorded]:
        """The latest; none where they are not recorded."""
        if self._daemon.journal is None:
            return []
        try:
            return list(read(self._daemon.journal.path, limit=LATEST))
        except (OSError, sqlite3.Error) as error:
            raise NotFound(f"no recorded decisions: {error}", source="edge") from error


def _difficulty(policy: Policy, records: Sequence[Recorded]) -> dict[str, Any]:
    curve, goal = _curve(), policy.goal
    return {
        "curve": [dataclasses.asdict(outlook) for outlook in curve],
        "goal": None if goal is None else goal.model_dump(exclude_none=True),
        "in_force": None if goal is None else dataclasses.asdict(outlook(goal, shipped_difficulty())),
        "measured": msgspec.to_builtins(shipped_assessments()),
        "recorded": _recorded(curve, policy, records),
    }


def _recorded(curve: Sequence[Outlook], policy: Policy, records: Sequence[Recorded]) -> dict[str, Any]:
    """What the latest requests say of it. `cloud_shares`: of those whose difficulty is known, the share at or above
    each threshold of the curve; `call_cost`: of one request in the cloud, by the policy's price."""
    known = [record.request.difficulty for record in records if record.request.difficulty is not None]
    price = policy.price
    return {
        "requests": len(records),
        "scored": len(known),
        "cloud_shares": [sum(one >= at.threshold for one in known) / len(known) for at in curve] if known else None,
        "call_cost": None if price is None or not records else mean_call_cost(records, price),
        "currency": None if price is None else price.currency,
    }


@functools.cache
def _curve() -> tuple[Outlook, ...]:
    model = shipped_difficulty()
    return tuple(model.at_share(point / CURVE_POINTS) for point in range(CURVE_POINTS + 1))
