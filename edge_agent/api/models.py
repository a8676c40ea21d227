"""What administration does with models: which are in memory, and to load or stop one."""

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

from edge_agent.backends.base import Loaded, LocalModels

Handler = Callable[[], Awaitable[dict[str, Any]]]
_ACTION: Final = re.compile(r"/admin/models/(?P<name>[^/]{1,128})/(?P<action>load|stop)")


def model_handler(local: LocalModels, path: str) -> tuple[str, Handler] | None:
    """The method and the work of a path under /admin/models; None if there is no such path."""

    async def listed() -> dict[str, Any]:
        return {"loaded": [_loaded(model) for model in local.loaded()]}

    if path == "/admin/models":
        return "GET", listed
    match = _ACTION.fullmatch(path)
    if match is None:
        return None
    name = match["name"]

    async def load() -> dict[str, Any]:
        await local.load(name)
        return await listed()

    async def stop() -> dict[str, Any]:
        return {"stopped": await local.stop(name), **await listed()}

    return "POST", load if match["action"] == "load" else stop


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
