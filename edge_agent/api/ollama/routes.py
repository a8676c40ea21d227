"""The Ollama surface: what generates, what embeds, and the two routes by which clients see that somebody is there."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import NoReturn

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from edge_agent.api.ollama.embed import old_embedding, several_embeddings
from edge_agent.api.ollama.models import LINES
from edge_agent.api.ollama.read import RENAMED, OllamaCall, parse_chat, parse_generate
from edge_agent.api.ollama.write import Kind, Lines, WholeObject, error_body, loaded_object
from edge_agent.backends.base import LocalModels
from shared.embeddings import Embed
from shared.errors import NotFound, UnknownModel
from shared.schemas import Answer
from shared.surface import Asked, Endpoint, Generation, Reply, Work, answering

PREFIX = "/api/"
HERE = ("auto", "edge")
"""Names of the default model of this device."""
REFUSED = ("/api/blobs/{digest:path}", "/api/copy", "/api/create", "/api/delete", "/api/push")

AnswerFor = Callable[[Mapping[str, str]], Answer]
EmbedFor = Callable[[Mapping[str, str]], Embed]
Parse = Callable[..., OllamaCall]


def add_ollama(
    app: FastAPI, answer_for: AnswerFor, *, embed_for: EmbedFor, local: LocalModels, known: Callable[[str], bool]
) -> None:
    """`known` says whether a model of this name is served, here or in the cloud."""
    post = partial(Route, methods=["POST"])
    endpoint = partial(Endpoint, source="edge", shape=error_body)

    async def running(_: Request) -> Response:
        return PlainTextResponse("Causeway is running")

    async def tell_version(request: Request) -> Response:
        answer_for(request.headers)
        return JSONResponse({"version": version("causeway")})

    app.router.routes += [
        post("/api/chat", endpoint(answer_for, partial(_begin, "chat", parse_chat, local, known))),
        post("/api/generate", endpoint(answer_for, partial(_begin, "generate", parse_generate, local, known))),
        post("/api/embed", endpoint(embed_for, several_embeddings)),
        post("/api/embeddings", endpoint(embed_for, old_embedding)),
        Route("/api/version", tell_version),
        Route("/", running),
        *(Route(path, _refused, methods=["POST", "PUT", "DELETE", "HEAD"]) for path in REFUSED),
    ]


def _begin(
    kind: Kind, parse: Parse, local: LocalModels, known: Callable[[str], bool], answer: Answer, asked: Asked
) -> Work:
    call = parse(asked.body, request_id=asked.id, label=asked.label)
    if call.request is None and not known(call.model):
        raise UnknownModel("no such model", param="model", source="edge")
    name = local.model_card().id if call.model in HERE else call.model
    if call.keep is not None:
        local.keep(name, call.keep.seconds)
    if call.request is None:
        return partial(_nothing, kind, call, local, name)
    encoder = (Lines if call.stream else WholeObject)(kind, call.model, clock=time.monotonic, now=_now)
    return answering(answer, Generation((call.request,), call.stream, encoder, RENAMED), media_type=LINES)


async def _nothing(kind: Kind, call: OllamaCall, local: LocalModels, name: str, reply: Reply) -> None:
    """Have the model in memory, or no more. One of the cloud's is not ours to load."""
    unload = call.keep is not None and call.keep.seconds == 0
    if name in {card.id for card in local.model_cards()}:
        with suppress(UnknownModel) if unload else nullcontext():  # not loaded is as good as unloaded
            await (local.stop(name) if unload else local.load(name))
    await reply.whole(loaded_object(kind, call.model, "unload" if unload else "load", _now()))


async def _refused(_: Request) -> NoReturn:
    raise NotFound("models are not made, copied, uploaded or deleted over HTTP: see `edge-agent --help`", source="edge")


def _now() -> datetime:
    return datetime.now(UTC)
