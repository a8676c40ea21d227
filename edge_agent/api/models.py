"""What administration does with models: which are in memory, and to load or stop one."""

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request

from edge_agent.api.administrators import AdminRoute
from edge_agent.backends.base import Loaded, LocalModels
from shared.administrators import Administrator


def model_routes(local: LocalModels) -> Iterator[AdminRoute]:
    async def listed(_: Request, __: Administrator) -> dict[str, Any]:
        return {"loaded": [_loaded(model) for model in local.loaded()]}

    async def load(request: Request, who: Administrator) -> dict[str, Any]:
        await local.load(request.path_params["name"])
        return await listed(request, who)

    async def stop(request: Request, who: Administrator) -> dict[str, Any]:
        return {"stopped": await local.stop(request.path_params["name"]), **await listed(request, who)}

    yield AdminRoute("GET", "/admin/models", "read", listed)
    yield AdminRoute("POST", "/admin/models/{name}/load", "activate", load)
    yield AdminRoute("POST", "/admin/models/{name}/stop", "activate", stop)


def _loaded(model: Loaded) -> dict[str, Any]:
    return {
        "name": model.name,
        "state": model.state,
        "size": model.size,
        "file_size": model.file_size,
        "processor": model.processor,
        "context_length": model.context_length,
        "running": model.running,
        "loaded_at": model.loaded_at.isoformat() if model.loaded_at else None,
        "expires_at": model.expires_at.isoformat() if model.expires_at else None,
    }
