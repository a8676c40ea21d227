"""Ollama's routes about models: what is in the store, what is in memory, and pulling one, which is administration."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge_agent.api.ollama.write import error_body
from edge_agent.backends.base import Loaded, LocalModels
from edge_agent.models.installed import ModelDetails, installed
from edge_agent.models.installed import show as details_of
from edge_agent.models.pull import Step, pull
from edge_agent.models.sources import Local, wanted
from shared.errors import BadRequest, Cancelled, Forbidden, UnknownModel
from shared.models import Manifest
from shared.openai import json_object, read_fields
from shared.schemas import ModelCard
from shared.surface import Asked, Endpoint, Reply, Work

LINES = b"application/x-ndjson"
PROGRESS_S = 0.1
"""Seconds between two lines about the same step."""
EPOCH = datetime.fromtimestamp(0, UTC)

Checked = Callable[[Mapping[str, str]], object]
"""By a request's headers, whether it may; raises if not."""


class NameBody(msgspec.Struct, kw_only=True):
    model: str = ""
    name: str = ""
    verbose: bool = False

    @property
    def asked(self) -> str:
        """Older clients say `name`. Raises BadRequest without either."""
        if not (self.model or self.name):
            raise BadRequest("model is missing", param="model")
        return self.model or self.name


class PullBody(NameBody, kw_only=True):
    stream: bool = True


NEUTRAL_PULL: Mapping[str, tuple[Any, ...]] = {"insecure": (False,), "password": ("",), "username": ("",)}


def add_models(
    app: FastAPI, local: LocalModels, cards: Callable[[], tuple[ModelCard, ...]], *, may_ask: Checked, may_pull: Checked
) -> None:
    """`cards` are the models that may be asked for, virtual ones first. Pulling is administration: `may_pull`."""

    async def tags(request: Request) -> Response:
        may_ask(request.headers)
        stored = [_stored(one.manifest, one.modified) for one in await asyncio.to_thread(installed, local.store)]
        names = {one["name"] for one in stored}
        return JSONResponse({"models": [*stored, *(_virtual(card) for card in cards() if card.id not in names)]})

    async def ps(request: Request) -> Response:
        may_ask(request.headers)
        found = {one.manifest.name: one.manifest for one in await asyncio.to_thread(installed, local.store)}
        return JSONResponse({"models": [_running(one, found.get(one.name)) for one in local.loaded()]})

    endpoint = partial(Endpoint, source="edge", shape=error_body)
    app.router.routes += [
        Route("/api/tags", tags),
        Route("/api/ps", ps),
        Route("/api/show", endpoint(may_ask, partial(_show, local.store, cards)), methods=["POST"]),
        Route("/api/pull", endpoint(may_pull, partial(_pull, local.store)), methods=["POST"]),
    ]


def _show(store: Path, cards: Callable[[], tuple[ModelCard, ...]], _: object, asked: Asked) -> Work:
    name = read_fields(json_object(asked.body), NameBody, {"options": ({},), "system": ("",), "template": ("",)}).asked

    async def work(reply: Reply) -> None:
        try:
            body = _details(await asyncio.to_thread(details_of, name, store=store))
        except UnknownModel:
            card = next((card for card in cards() if card.id == name), None)
            if card is None:
                raise
            body = {**_virtual(card), "model_info": {"general.context_length": card.context_length}}
            body |= {"template": "", "capabilities": ["completion", "tools"]}
        await reply.whole(msgspec.json.encode(body))

    return work


def _pull(store: Path, _: object, asked: Asked) -> Work:
    fields = read_fields(json_object(asked.body), PullBody, NEUTRAL_PULL)
    if isinstance(wanted(fields.asked).source, Local):
        raise Forbidden("a file of this device is pulled by `edge-agent pull` only", param="model", source="edge")
    return partial(_pulling, fields.asked, store, fields.stream)


async def _pulling(name: str, store: Path, stream: bool, reply: Reply) -> None:
    """The pull blocks, in a thread; of its steps only the latest waits to be told. Who leaves ends it; the next one
    goes on where it broke."""
    latest: list[Step] = []
    left = False

    def told(step: Step) -> None:
        if left:
            raise Cancelled("nobody waits for this pull")
        latest[:] = [step]

    pulled = asyncio.create_task(asyncio.to_thread(pull, name, store=store, told=told))
    try:
        while not pulled.done():
            await asyncio.wait({pulled}, timeout=PROGRESS_S)
            if latest and stream:
                if not reply.started:
                    await reply.stream(LINES, lambda error: error_body(error) + b"\n")
                await reply.write(_line(latest.pop()), more=True)
        digest = pulled.result().manifest.sha256
    finally:
        left = True
        pulled.cancel()
    success = msgspec.json.encode({"status": "success", "digest": f"sha256:{digest}"})
    if not stream:
        await reply.whole(success)
        return
    if not reply.started:
        await reply.stream(LINES, lambda error: error_body(error) + b"\n")
    await reply.write(success + b"\n", more=False)


def _line(step: Step) -> bytes:
    sizes = {"completed": step.done} | ({} if step.total is None else {"total": step.total})
    return msgspec.json.encode({"status": step.status, **(sizes if step.done or step.total else {})}) + b"\n"


def _stored(manifest: Manifest, modified: datetime) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "model": manifest.name,
        "modified_at": modified.isoformat(),
        "size": manifest.size,
        "digest": manifest.sha256,
        "details": _about(manifest),
    }


def _virtual(card: ModelCard) -> dict[str, Any]:
    """`auto`, `edge`, `cloud` and the cloud's own: they have no file here, but can be asked."""
    digest = hashlib.sha256(card.id.encode()).hexdigest()
    about = _about(Manifest(name=card.id, size=0, sha256=digest))
    modified = EPOCH.isoformat()
    return {"name": card.id, "model": card.id, "modified_at": modified, "size": 0, "digest": digest, "details": about}


def _about(manifest: Manifest) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf" if manifest.size else "",
        "family": manifest.architecture,
        "families": [manifest.architecture] if manifest.architecture else [],
        "parameter_size": f"{manifest.parameters / 1e6:.0f}M" if manifest.parameters else "",
        "quantization_level": manifest.quantization,
    }


def _running(loaded: Loaded, manifest: Manifest | None) -> dict[str, Any]:
    known = manifest or Manifest(name=loaded.name, size=loaded.file_size, sha256="")
    stays = datetime.max.replace(tzinfo=UTC)
    return {
        "name": loaded.name,
        "model": loaded.name,
        "size": loaded.size,
        "digest": known.sha256,
        "details": _about(known),
        "expires_at": (loaded.expires_at or stays).isoformat(),
        "size_vram": 0,
        "context_length": loaded.context_length,
    }


def _details(found: ModelDetails) -> dict[str, Any]:
    facts, manifest = found.facts, found.installed.manifest
    name = facts.architecture
    return {
        "modelfile": "",
        "parameters": "",
        "template": facts.template,
        "license": manifest.licence,
        "modified_at": found.installed.modified.isoformat(),
        "details": _about(manifest),
        "model_info": {
            "general.architecture": name,
            "general.parameter_count": facts.parameters,
            f"{name}.context_length": facts.context_length,
            f"{name}.embedding_length": facts.embedding_length,
        },
        "capabilities": ["embedding"] if manifest.kind == "embedding" else ["completion", "tools"],
    }
