"""What administration does with models: which are in memory, and what a prompt would take in each and in the cloud; to
load or stop one.

`GET /admin/models?prompt_tokens=1200&answer_tokens=50` says what for. Without them it is a typical prompt, and
an answer as long as the policy in force expects.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

from starlette.requests import Request

from edge_agent.api.administrators import AdminRoute
from edge_agent.backends.base import Loaded
from edge_agent.daemon import Daemon
from router.features import DeviceReading, RequestFeatures
from router.predict import Predictions, predict
from shared.administrators import Administrator
from shared.errors import BadRequest

TYPICAL_PROMPT: Final = 200
"""Tokens: a question with a paragraph to it."""
MOST_TOKENS: Final = 1 << 20


def model_routes(daemon: Daemon) -> Iterator[AdminRoute]:
    local = daemon.local

    async def listed(request: Request, _: Administrator) -> dict[str, Any]:
        return _listed(daemon, _asked(daemon, request))

    async def load(request: Request, who: Administrator) -> dict[str, Any]:
        await local.load(request.path_params["name"])
        return await listed(request, who)

    async def stop(request: Request, who: Administrator) -> dict[str, Any]:
        return {"stopped": await local.stop(request.path_params["name"]), **await listed(request, who)}

    yield AdminRoute("GET", "/admin/models", "read", listed)
    yield AdminRoute("POST", "/admin/models/{name}/load", "activate", load)
    yield AdminRoute("POST", "/admin/models/{name}/stop", "activate", stop)


def _asked(daemon: Daemon, request: Request) -> RequestFeatures:
    return RequestFeatures(
        prompt_tokens=_tokens(request, "prompt_tokens", TYPICAL_PROMPT),
        expected_output_tokens=_tokens(request, "answer_tokens", daemon.policy.policy.expected_output_tokens),
    )


def _tokens(request: Request, name: str, usual: int) -> int:
    """Raises BadRequest naming the parameter."""
    text = request.query_params.get(name)
    if text is None:
        return usual
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and 0 < int(text) <= MOST_TOKENS):
        raise BadRequest(f"{name} must be a whole number from 1 to {MOST_TOKENS}", param=name, source="edge")
    return int(text)


def _listed(daemon: Daemon, asked: RequestFeatures) -> dict[str, Any]:
    """What was not measured yet is None."""
    price, link, default = daemon.policy.policy.price, daemon.agent.link(), daemon.device.reading()

    def predicted(device: DeviceReading) -> Predictions:
        return predict(asked, device, link, price)

    found: dict[str, Any] = {
        "asked": {"prompt_tokens": asked.prompt_tokens, "answer_tokens": asked.expected_output_tokens},
        "memory_available": default.memory_available,
        "loaded": [],
        "cloud": None,
    }
    for model in daemon.local.loaded():
        device = daemon.device.reading(model.name)
        found["loaded"].append({**_loaded(model, device), "predicted": dataclasses.asdict(predicted(device).edge)})
    if link.configured:
        found["cloud"] = {
            "model": link.model,
            "connected": link.connected,
            "currency": price.currency if price else None,
            "predicted": dataclasses.asdict(predicted(default).cloud),
        }
    return found


def _loaded(model: Loaded, device: DeviceReading) -> dict[str, Any]:
    """`running` also counts who waits for it, `queued` alone who waits for a slot."""
    return {
        "name": model.name,
        "state": model.state,
        "size": model.size,
        "file_size": model.file_size,
        "processor": model.processor,
        "context_length": model.context_length,
        "running": model.running,
        "queued": device.queue_depth,
        "slots": device.slots,
        "prompt_tokens_per_s": device.prefill_tokens_per_s,
        "answer_tokens_per_s": device.tokens_per_s,
        "loaded_at": model.loaded_at.isoformat() if model.loaded_at else None,
        "expires_at": model.expires_at.isoformat() if model.expires_at else None,
        "stays": model.stays,
    }
