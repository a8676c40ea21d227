"""The OpenAI HTTP surface that both ends serve: routes over one `Answer`, server-sent events, error objects.

    POST /v1/chat/completions  /v1/completions  (and /v1/embeddings, where there are any)
    GET  /v1/models  /v1/models/{id}  /health  /metrics

An error after the first token is an explicit `data: {"error": ...}` event and no `[DONE]`; all else that surfaces have
in common is in `shared.surface`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as HttpRoute

from shared.binding import Tls, check_bind
from shared.embeddings import Embed, embedding_reply, parse_embeddings
from shared.errors import BadRequest, CausewayError, Internal, MethodNotAllowed, NotFound, Source, UnknownModel
from shared.guard import Guard, Guarded, Shape, error_headers
from shared.openai import Call, parse_chat, parse_completion
from shared.replies import Chunks, Whole, error_body, model_list, model_object
from shared.schemas import Answer, ModelCard
from shared.serving import serve
from shared.surface import Asked, Endpoint, Generation, Reply, Work, generating

__all__ = ["Guard", "Tls", "check_bind", "create_app", "serve"]

AnswerFor = Callable[[Mapping[str, str]], Answer]
EmbedFor = Callable[[Mapping[str, str]], Embed]


class _Parse(Protocol):
    def __call__(self, body: bytes, *, request_id: str, label: str | None = None) -> Call: ...


def create_app(
    *,
    answer_for: AnswerFor,
    models: Callable[[], Sequence[ModelCard]],
    health: Callable[[], Mapping[str, Any]],
    registry: CollectorRegistry,
    source: Source,
    guard: Guard,
    embed_for: EmbedFor | None = None,
    shape_of: Callable[[str], Shape] = lambda _: error_body,
) -> FastAPI:
    """Build the surface.

    `answer_for` gets a request's headers (names in lower case) and says who answers it, or raises, say, Unauthorized;
    every route but `/health` asks it first (for embeddings: `embed_for`, without which there are none).
    `/health` is 200 while `health()["status"]` is "ok", else 503. `shape_of` says how errors look on a path.
    """
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # our own events are the only ones
    )
    app.add_middleware(Guarded, guard=guard, source=source, shape_of=shape_of)
    app.add_exception_handler(HTTPException, _http_error(source, shape_of))
    app.add_exception_handler(RequestValidationError, _http_error(source, shape_of))
    started = int(time.time())

    async def list_models(request: Request) -> Response:
        answer_for(request.headers)
        return _json(model_list(models(), started))

    async def one_model(request: Request) -> Response:
        answer_for(request.headers)
        name = request.path_params["name"]
        for card in models():
            if card.id == name:
                return _json(model_object(card, started))
        raise UnknownModel("no such model", param="model", source=source)

    async def metrics(request: Request) -> Response:
        answer_for(request.headers)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def state(_: Request) -> Response:
        body = dict(health())
        return JSONResponse(body, status_code=200 if body.get("status") == "ok" else 503)

    generate = partial(Endpoint, answer_for, source=source, shape=error_body)
    app.router.routes += [
        HttpRoute("/v1/chat/completions", generate(_reading(parse_chat, "chatcmpl-")), methods=["POST"]),
        HttpRoute("/v1/completions", generate(_reading(parse_completion, "cmpl-")), methods=["POST"]),
        HttpRoute("/v1/models", list_models),
        HttpRoute("/v1/models/{name:path}", one_model),
        HttpRoute("/health", state),
        HttpRoute("/metrics", metrics),
    ]
    if embed_for is not None:
        embed = Endpoint(embed_for, _embedding, source=source, shape=error_body)
        app.router.routes.append(HttpRoute("/v1/embeddings", embed, methods=["POST"]))
    return app


def _reading(parse: _Parse, prefix: str) -> Callable[[Answer, Asked], Work]:
    def read(asked: Asked) -> Generation:
        call = parse(asked.body, request_id=asked.id, label=asked.label)
        encoder = (Chunks if call.stream else Whole)(call, reply_id=prefix + asked.id, created=int(time.time()))
        return Generation(call.requests, call.stream, encoder, {"grammar": call.grammar_field})

    return generating(read)


def _embedding(embed: Embed, asked: Asked) -> Work:
    request, encoding = parse_embeddings(asked.body, request_id=asked.id)

    async def work(reply: Reply) -> None:
        made = await embed(request)
        await reply.whole(await asyncio.to_thread(embedding_reply, made, request.model, encoding))

    return work


def _http_error(
    source: Source, shape_of: Callable[[str], Shape]
) -> Callable[[Request, Exception], Awaitable[Response]]:
    """What the framework refuses by itself (no such path, wrong method), as our error object."""

    async def handler(request: Request, error: Exception) -> Response:
        known: CausewayError = BadRequest("the request does not fit this route", source=source)
        if isinstance(error, HTTPException):
            kinds: dict[int, CausewayError] = {
                404: NotFound("no such path", source=source),
                405: MethodNotAllowed("this path has no such method", source=source),
            }
            fallback = Internal("the request failed", source=source) if error.status_code >= 500 else known
            known = kinds.get(error.status_code, fallback)
        headers = dict(getattr(error, "headers", None) or {})
        body = shape_of(request.scope["path"])(known)
        own = {name.decode(): value.decode() for name, value in error_headers(known, body)}
        return Response(body, status_code=known.status, headers={**headers, **own})

    return handler


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
