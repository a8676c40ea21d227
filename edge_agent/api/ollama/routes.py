"""The Ollama surface: what generates, what embeds, and the two routes by which clients see that somebody is there."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import NoReturn

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from edge_agent.api.ollama.embed import old_embedding, several_embeddings
from edge_agent.api.ollama.read import RENAMED, OllamaCall, parse_chat, parse_generate
from edge_agent.api.ollama.write import Kind, Lines, WholeObject, error_body, loaded_object
from shared.embeddings import Embed
from shared.errors import NotFound, UnknownModel
from shared.schemas import Answer
from shared.surface import Asked, Endpoint, Generation, Reply, Work, answering

PREFIX = "/api/"
LINES = b"application/x-ndjson"
REFUSED = ("/api/blobs/{digest:path}", "/api/copy", "/api/create", "/api/delete", "/api/push")

AnswerFor = Callable[[Mapping[str, str]], Answer]
EmbedFor = Callable[[Mapping[str, str]], Embed]
Parse = Callable[..., OllamaCall]


def add_ollama(app: FastAPI, answer_for: AnswerFor, *, embed_for: EmbedFor, known: Callable[[str], bool]) -> None:
    """`known` says whether a model of this name is served."""
    post = partial(Route, methods=["POST"])
    endpoint = partial(Endpoint, source="edge", shape=error_body)

    async def running(_: Request) -> Response:
        return PlainTextResponse("Causeway is running")

    async def tell_version(request: Request) -> Response:
        answer_for(request.headers)
        return JSONResponse({"version": version("causeway")})

    app.router.routes += [
        post("/api/chat", endpoint(answer_for, partial(_begin, "chat", parse_chat, known))),
        post("/api/generate", endpoint(answer_for, partial(_begin, "generate", parse_generate, known))),
        post("/api/embed", endpoint(embed_for, several_embeddings)),
        post("/api/embeddings", endpoint(embed_for, old_embedding)),
        Route("/api/version", tell_version),
        Route("/", running),
        *(Route(path, _refused, methods=["POST", "PUT", "DELETE", "HEAD"]) for path in REFUSED),
    ]


def _begin(kind: Kind, parse: Parse, known: Callable[[str], bool], answer: Answer, asked: Asked) -> Work:
    call = parse(asked.body, request_id=asked.id, label=asked.label)
    if call.request is None:
        if not known(call.model):
            raise UnknownModel("no such model", param="model", source="edge")
        return partial(_nothing, kind, call)
    encoder = (Lines if call.stream else WholeObject)(kind, call.model, clock=time.monotonic, now=_now)
    return answering(answer, Generation((call.request,), call.stream, encoder, RENAMED), media_type=LINES)


async def _nothing(kind: Kind, call: OllamaCall, reply: Reply) -> None:
    await reply.whole(loaded_object(kind, call.model, "unload" if call.unload else "load", _now()))


async def _refused(_: Request) -> NoReturn:
    raise NotFound("models are not made, copied, uploaded or deleted over HTTP: see `edge-agent --help`", source="edge")


def _now() -> datetime:
    return datetime.now(UTC)
