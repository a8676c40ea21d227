"""The door in front of every route: who may knock (Host, Origin), with what (JSON), how much and how fast.

Pure ASGI, so that a client's leaving is seen behind it. Every check is here once, for HTTP and WebSocket alike:

- Host names this server (loopback, or configured): a web page cannot reach us by rebinding its own name.
- Origin, if sent, is allow-listed or, over HTTP, our own (the console's): no other page can use us.
- A body is application/json, unencoded, under the limit as it arrives, and arrives in time.
- Any exception from inside becomes a typed error object; its message, which may hold a prompt, is not logged.
"""

import asyncio
import math
import re
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.errors import BadRequest, CausewayError, Forbidden, Internal, Source, TooLarge, UnsupportedMedia
from shared.replies import error_body

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
MAX_LENGTH_DIGITS = 18
LINGER_S = 1.0
LINGER_BYTES = 16 * 1024 * 1024

_HOST = re.compile(rb"(\[[0-9a-fA-F:.]{2,45}\]|[a-zA-Z0-9._-]{1,253})(?::[0-9]{1,5})?")
_JSON = re.compile(r'application/json\s*(;\s*charset\s*=\s*"?utf-8"?\s*)?', re.IGNORECASE)

Header = tuple[bytes, bytes]
Shape = Callable[[CausewayError], bytes]
"""The body that says an error, in a surface's words."""


class HeadersTooLarge(BadRequest):
    code, status = "headers_too_large", 431


class BodyTimeout(CausewayError):
    code, status = "request_timeout", 408


@dataclass(frozen=True, slots=True)
class Guard:
    """What is let in. `hosts` and `origins` are in addition to the loopback names; sizes in bytes, times in seconds."""

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    max_body: int = 4 * 1024 * 1024
    body_timeout: float = 30.0
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    def check(self, scope: Scope) -> None:
        """Refuse by the headers alone. Raises Forbidden, HeadersTooLarge, UnsupportedMedia or TooLarge."""
        headers: list[Header] = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            raise HeadersTooLarge("too many or too long headers")
        self._check_host(_values(headers, b"host"))
        for origin in _values(headers, b"origin"):
            if origin not in self.origins and origin != _own_origin(scope):
                raise Forbidden("this Origin is not allowed", param="origin")
        if scope["type"] == "http":
            self._check_body(scope["method"], headers)

    def allowed_origin(self, scope: Scope) -> str | None:
        """The request's Origin, once `check` has passed."""
        return next(iter(_values(scope["headers"], b"origin")), None)

    def _check_host(self, hosts: list[str]) -> None:
        match = _HOST.fullmatch(hosts[0].encode("latin-1")) if len(hosts) == 1 else None
        name = match.group(1).decode().lower() if match else ""
        if name not in LOOPBACK_NAMES and name not in self.hosts:
            raise Forbidden("this Host is not served here", param="host")

    def _check_body(self, method: str, headers: list[Header]) -> None:
        if any(value.strip().lower() != "identity" for value in _values(headers, b"content-encoding")):
            raise UnsupportedMedia("an encoded body is not accepted", param="content-encoding")
        if method in {"POST", "PUT", "PATCH"}:
            kinds = _values(headers, b"content-type")
            if len(kinds) != 1 or not _JSON.fullmatch(kinds[0].strip()):
                raise UnsupportedMedia("content-type must be application/json", param="content-type")
        lengths = _values(headers, b"content-length")
        if lengths and _values(headers, b"transfer-encoding"):
            raise BadRequest("a body has either a length or chunks", param="content-length")
        for length in lengths:
            if not length.isdecimal() or len(length) > MAX_LENGTH_DIGITS or int(length) > self.max_body:
                raise self.too_large()

    def too_large(self) -> TooLarge:
        return TooLarge(f"the body may have at most {self.max_body} bytes")


def _own_origin(scope: Scope) -> str | None:
    """What a page that this server itself served says it is, over HTTP. Its Host has passed the check."""
    if scope["type"] != "http":
        return None
    return f"{scope.get('scheme', 'http')}://{''.join(_values(scope['headers'], b'host'))}"


class Guarded:
    """ASGI middleware that applies a Guard. `shape_of` says how errors look on a path."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        guard: Guard,
        source: Source,
        shape_of: Callable[[str], Shape] = lambda _: error_body,
    ) -> None:
        self._app = app
        self._guard = guard
        self._source = source
        self._shape_of = shape_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(self._guard, scope, receive, send)
        try:
            self._guard.check(scope)
            exchange.origin = self._guard.allowed_origin(scope)
            if scope["method"] == "OPTIONS" and exchange.origin:
                await exchange.send_empty(204)
            else:
                await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            known = typed(error, self._source)
            if exchange.started:
                raise known from None  # the server cuts the connection
            await send_error(exchange.send, known, shape=self._shape_of(scope["path"]))

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._guard.check(scope)
        except CausewayError as error:
            await receive()
            await refuse_websocket(scope, send, error.at(self._source))
        else:
            await self._app(scope, receive, send)


class _Exchange:
    """One HTTP request's `receive` and `send`, with the body's limits and a polite end.

    If the answer is ready before the body has all come (a refusal), the answer says `connection: close`, and what
    still arrives is thrown away for a moment before closing: a reset would take the answer out of the client's hands.
    """

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        headers: list[Header] = scope["headers"]
        self._guard = guard
        self._receive = receive
        self._send = send
        self._size = 0
        self._whole = not any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers
        )
        self._deadline = guard.clock() + guard.body_timeout
        self.origin: str | None = None
        self.started = False

    async def receive(self) -> Message:
        """Raises TooLarge or BodyTimeout; once the body is whole, only waits for the client to leave."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._deadline - self._guard.clock())):
                message = await self._receive()
        except TimeoutError as error:
            raise BodyTimeout(f"the body did not arrive within {self._guard.body_timeout:g} s") from error
        self._note(message)
        if self._size > self._guard.max_body:
            raise self._guard.too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            extra = [(b"connection", b"close")] if not self._whole else []
            message = {**message, "headers": [*message.get("headers", ()), *extra, *_cors(self.origin)]}
        elif not self._whole and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def send_empty(self, status: int) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await self.send({"type": "http.response.body", "body": b""})

    async def _linger(self) -> None:
        end = self._size + LINGER_BYTES
        try:
            async with asyncio.timeout(LINGER_S):
                while not self._whole and self._size < end:
                    self._note(await self._receive())
        except TimeoutError:
            return

    def _note(self, message: Message) -> None:
        self._size += len(message.get("body", b""))
        self._whole = message["type"] == "http.disconnect" or not message.get("more_body", False)


def typed(error: Exception, source: Source) -> CausewayError:
    """Any exception as a typed one. A fault of ours is logged by place and type, never by message."""
    if isinstance(error, CausewayError):
        return error.at(source)
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    structlog.get_logger("causeway.http").error("internal", exception=type(error).__name__, at=places[-8:])
    return Internal("an internal fault; the server's log has its place", source=source)


async def send_error(
    send: Send, error: CausewayError, headers: Iterable[Header] = (), *, shape: Shape = error_body
) -> None:
    """The error as a body with its status and, where known, Retry-After."""
    body = shape(error)
    all_headers = [*error_headers(error, body), *headers]
    await send({"type": "http.response.start", "status": error.status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})


async def refuse_websocket(scope: Scope, send: Send, error: CausewayError) -> None:
    """Answer an upgrade that has been received, but not accepted, with an HTTP error."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    start, body = "websocket.http.response.start", error_body(error)
    await send({"type": start, "status": error.status, "headers": error_headers(error, body)})
    await send({"type": "websocket.http.response.body", "body": body})


def error_headers(error: CausewayError, body: bytes) -> list[Header]:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def _cors(origin: str | None) -> list[Header]:
    if origin is None:
        return []
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-headers", b"authorization, content-type, x-causeway-label, x-request-id"),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"vary", b"Origin"),
    ]


def _values(headers: Iterable[Header], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in headers if key == name]
