"""The OpenAI HTTP surface that both ends serve: routes over one `Answer`, server-sent events, error objects.

    POST /v1/chat/completions  /v1/completions  (and /v1/embeddings, where there are any)
    GET  /v1/models  /v1/models/{id}  /health  /metrics

The status line waits for the first token, so that an error before it has a real status; an error after it is an
explicit `data: {"error": ...}` event and no `[DONE]`. Whoever leaves is not computed for: one watcher owns `receive`
and cancels the answer, streaming or not.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as HttpRoute
from starlette.types import Receive, Scope, Send

from shared.choices import merged
from shared.embeddings import Embed, EmbeddingRequest, Encoding, embedding_reply, parse_embeddings
from shared.errors import (
    BadRequest,
    CausewayError,
    DeadlineExceeded,
    Internal,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    SlowConsumer,
    Source,
    UnknownModel,
)
from shared.guard import Guard, Guarded, Header, error_headers, send_error, typed
from shared.openai import Call, parse_chat, parse_completion
from shared.replies import Chunks, Whole, error_body, error_event, model_list, model_object
from shared.schemas import Answer, Delta, ModelCard, Route
from shared.serving import Tls, check_bind, serve

__all__ = ["Guard", "Tls", "check_bind", "create_app", "serve"]

SEND_TIMEOUT = 60.0
"""Seconds a reader may leave a full socket unread before its request is given up."""
DEADLINE_GRACE = 1.0
"""Seconds beyond a request's deadline for its answer, or its error, to come."""
MAX_CLIENT_ID = 120
MAX_HEADER_VALUE = 256

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
) -> FastAPI:
    """Build the surface.

    `answer_for` gets a request's headers (names in lower case) and says who answers it, or raises, say, Unauthorized;
    every route but `/health` asks it first (for embeddings: `embed_for`, without which there are none).
    `/health` is 200 while `health()["status"]` is "ok", else 503.
    """
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # our own events are the only ones
    )
    app.add_middleware(Guarded, guard=guard, source=source)
    app.add_exception_handler(HTTPException, _http_error(source))
    app.add_exception_handler(RequestValidationError, _http_error(source))
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

    app.router.routes += [
        HttpRoute("/v1/chat/completions", _Generate(answer_for, parse_chat, "chatcmpl-", source), methods=["POST"]),
        HttpRoute("/v1/completions", _Generate(answer_for, parse_completion, "cmpl-", source), methods=["POST"]),
        HttpRoute("/v1/models", list_models),
        HttpRoute("/v1/models/{name:path}", one_model),
        HttpRoute("/health", state),
        HttpRoute("/metrics", metrics),
    ]
    if embed_for is not None:
        app.router.routes.append(HttpRoute("/v1/embeddings", _Embed(embed_for, source), methods=["POST"]))
    return app


class _Generate:
    """ASGI endpoint: one body in, one answer out, as events or in one piece."""

    def __init__(self, answer_for: AnswerFor, parse: _Parse, prefix: str, source: Source) -> None:
        self._answer_for = answer_for
        self._parse = parse
        self._prefix = prefix
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        own_id = f"req_{uuid.uuid4().hex}"
        request_id = headers.get("x-request-id") or own_id
        try:
            answer = self._answer_for(headers)
            _check_id(request_id)
            body = await _read_body(receive)
            # The client's id is echoed, ours is what executions go by: a client may send the same id again.
            call = self._parse(body, request_id=own_id, label=headers.get("x-causeway-label"))
        except _Left:
            return
        reply = _Reply(call, send, request_id, self._prefix + own_id, self._source)
        try:
            await _while_connected(reply.run(answer), receive)
        except asyncio.CancelledError:
            # The server stops and gave this request up: say so, rather than cut it.
            await reply.fail(Overloaded("the server is stopping", source=self._source, retry_after=1))


class _Embed:
    """ASGI endpoint: texts in, vectors out."""

    def __init__(self, embed_for: EmbedFor, source: Source) -> None:
        self._embed_for = embed_for
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        own_id = f"req_{uuid.uuid4().hex}"
        request_id = headers.get("x-request-id") or own_id
        try:
            embed = self._embed_for(headers)
            _check_id(request_id)
            request, encoding = parse_embeddings(await _read_body(receive), request_id=own_id)
        except _Left:
            return
        reply = _Vectors(send, request_id, self._source)
        try:
            await _while_connected(reply.run(embed, request, encoding), receive)
        except asyncio.CancelledError:
            await reply.fail(Overloaded("the server is stopping", source=self._source, retry_after=1))


class _Response:
    """Sends what one request is answered with."""

    def __init__(self, send: Send, request_id: str, source: Source) -> None:
        self._send = send
        self._request_id = request_id
        self._source = source
        self._started = False

    async def fail(self, error: CausewayError) -> None:
        if self._started:
            await self._write(error_event(error), more=False)
        else:
            self._started = True
            await send_error(self._send, error, [(b"x-request-id", self._request_id.encode())])

    async def _start(self, media_type: bytes, route: Route | None, extra: list[Header]) -> None:
        self._started = True
        headers = [(b"content-type", media_type), (b"x-request-id", self._request_id.encode()), *extra]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers + _route_headers(route)})

    async def _write(self, body: bytes, *, more: bool) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT):
                await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError as error:
            raise SlowConsumer("the client stopped reading", source=self._source) from error


class _Vectors(_Response):
    async def run(self, embed: Embed, request: EmbeddingRequest, encoding: Encoding) -> None:
        try:
            made = await embed(request)
            body = await asyncio.to_thread(embedding_reply, made, request.model, encoding)
        except Exception as error:
            await self.fail(typed(error, self._source))
            return
        await self._start(b"application/json", None, [(b"content-length", b"%d" % len(body))])
        await self._write(body, more=False)


class _Reply(_Response):
    """One answer. Whatever happens, the client gets the end of it or an explicit error."""

    def __init__(self, call: Call, send: Send, request_id: str, reply_id: str, source: Source) -> None:
        super().__init__(send, request_id, source)
        self._call = call
        self._reply_id = reply_id

    async def run(self, answer: Answer) -> None:
        deltas, limit = merged(answer, self._call.requests), self._call.deadline_s
        # Whoever answers keeps the deadline; one that does not is not waited for.
        deadline = asyncio.timeout(None if limit is None else limit + DEADLINE_GRACE)
        try:
            async with aclosing(deltas), deadline:
                await (self._stream(deltas) if self._call.stream else self._whole(deltas))
        except SlowConsumer:
            raise  # no use to tell who does not read: the connection is cut
        except Exception as error:
            late = DeadlineExceeded("the deadline has passed", source=self._source)
            await self.fail(late if deadline.expired() else typed(error, self._source))

    async def fail(self, error: CausewayError) -> None:
        if error.param == "grammar":
            error.param = self._call.grammar_field
        await super().fail(error)

    async def _stream(self, deltas: AsyncGenerator[tuple[int, Delta], None]) -> None:
        chunks = Chunks(self._call, reply_id=self._reply_id, created=int(time.time()))
        held = b""
        async for index, delta in deltas:
            held += chunks.push(index, delta)
            if not self._started and not (delta.tokens or delta.text or delta.tool_calls or delta.finish_reason):
                continue  # nothing of the answer yet: an error still can have its own status
            if not self._started:
                await self._start(b"text/event-stream; charset=utf-8", delta.route, [(b"cache-control", b"no-cache")])
            if held:
                await self._write(held, more=True)
                held = b""
        await self._write(chunks.end(), more=False)

    async def _whole(self, deltas: AsyncGenerator[tuple[int, Delta], None]) -> None:
        whole = Whole(self._call, reply_id=self._reply_id, created=int(time.time()))
        async for index, delta in deltas:
            whole.push(index, delta)
        body = whole.end()
        await self._start(b"application/json", whole.route, [(b"content-length", b"%d" % len(body))])
        await self._write(body, more=False)


class _Left(Exception):
    """The client left before its request was whole."""


async def _read_body(receive: Receive) -> bytes:
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Left
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `work` to its end, or until the client leaves or this task is cancelled; leaves nothing running."""
    tasks = {asyncio.create_task(work), asyncio.create_task(_disconnected(receive))}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_id(request_id: str) -> None:
    if not 0 < len(request_id) <= MAX_CLIENT_ID or not request_id.isascii() or not request_id.isprintable():
        raise BadRequest(f"x-request-id must be 1 to {MAX_CLIENT_ID} printable ASCII characters", param="x-request-id")


def _route_headers(route: Route | None) -> list[Header]:
    if route is None:
        return []
    values = {"route": route.target, "reason": route.reason, "failovers": str(route.failovers)}
    return [(f"x-causeway-{name}".encode(), _header_value(value)) for name, value in values.items()]


def _header_value(text: str) -> bytes:
    """Printable ASCII of bounded length: no reason, whatever it holds, can start another header."""
    return "".join(char if " " <= char <= "~" else "?" for char in text[:MAX_HEADER_VALUE]).strip().encode()


def _http_error(source: Source) -> Callable[[Request, Exception], Awaitable[Response]]:
    """What the framework refuses by itself (no such path, wrong method), as our error object."""

    async def handler(_: Request, error: Exception) -> Response:
        known: CausewayError = BadRequest("the request does not fit this route", source=source)
        if isinstance(error, HTTPException):
            kinds: dict[int, CausewayError] = {
                404: NotFound("no such path", source=source),
                405: MethodNotAllowed("this path has no such method", source=source),
            }
            fallback = Internal("the request failed", source=source) if error.status_code >= 500 else known
            known = kinds.get(error.status_code, fallback)
        headers = dict(getattr(error, "headers", None) or {})
        own = {name.decode(): value.decode() for name, value in error_headers(known)}
        return Response(error_body(known), status_code=known.status, headers={**headers, **own})

    return handler


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
