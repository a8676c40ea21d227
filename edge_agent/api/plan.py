"""`POST /v1/route`: the body of a chat completion in, what would be done with it out. Nothing is run or recorded."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.routing import Route

from edge_agent.agent import Agent, Plan
from edge_agent.caller import Caller
from shared.errors import CausewayError
from shared.openai import parse_chat
from shared.replies import error_body, error_object
from shared.surface import Asked, Endpoint, Reply, Work

PATH = "/v1/route"


def add_route_plan(app: FastAPI, caller_of: Callable[[Mapping[str, str]], Caller], agent: Agent) -> None:
    def begin(caller: Caller, asked: Asked) -> Work:
        (request, *_) = parse_chat(asked.body, request_id=asked.id, label=asked.label).requests

        async def work(reply: Reply) -> None:
            await reply.whole(msgspec.json.encode(plan_object(await agent.plan(request, caller))))

        return work

    app.router.routes.append(Route(PATH, Endpoint(caller_of, begin, source="edge", shape=error_body), methods=["POST"]))


def plan_object(plan: Plan) -> dict[str, Any]:
    """No text of the request is in it: it says what was measured, decided, and by which version of the policy."""
    seen = plan.record
    said: dict[str, Any] = {"object": "route", "policy": seen.policy}
    if isinstance(plan.decision, CausewayError):
        said |= {"target": None, "refused": error_object(plan.decision)["error"]}
    else:
        decision = plan.decision
        said |= {
            "target": decision.target,
            "fallback": decision.fallback,
            "rule": decision.rule,
            "reasons": decision.reasons,
            "label": decision.label,
            "redact": decision.redact,
            "escalates": decision.escalates,
            "predictions": decision.predictions,
        }
    return {**said, "seen": {"request": seen.request, "device": seen.device, "link": seen.link}}
