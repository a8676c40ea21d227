"""What every HTTP surface shares: one body in, one reply out, whatever words the surface has for them.

A surface reads a body into a `Generation`: the requests for an `Answer`, and an `Encoder` that puts what is answered.
The status line waits for the first token, so that an error before it has a real status; an error after it is an
explicit end, in the encoder's words. Whoever leaves is not computed for: one watcher owns `receive` and cancels the
work.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from shared.choices import merged
from shared.errors import BadRequest, CausewayError, DeadlineExceeded, Overloaded, SlowConsumer, Source
from shared.guard import Header, Shape, send_error, typed
from shared.schemas import Answer, ChatRequest, Delta, Route

SEND_TIMEOUT = 60.0
"""Seconds a reader may leave a full socket unread before its request is given up."""
DEADLINE_GRACE = 1.0
"""Seconds beyond a request's deadline for its answer, or its error, to come."""
MAX_CLIENT_ID = 120
MAX_HEADER_VALUE = 256

JSON = b"application/json"
EVENTS = b"text/event-stream; charset=utf-8"

_T = TypeVar("_T")


class Encoder(Protocol):
    """One answer in a surface's words. What `push`, `end` and `fail` return is the body, piece by piece."""

    @property
    def route(self) -> Route | None: ...

    def push(self, index: int, delta: Delta) -> bytes: ...

    def end(self) -> bytes:
        """Raises UpstreamFailed if the answer has not had its last delta."""

    def fail(self, error: CausewayError) -> bytes:
        """The explicit end of a stream that failed after its first token."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One HTTP request. `id` is what its executions go by: a client may send the same id again."""

    headers: Mapping[str, str]
    body: bytes
    id: str

    @property
    def label(self) -> str | None:
        return self.headers.get("x-causeway-label")


@dataclass(frozen=True, slots=True)
class Generation:
    """A body, read. `requests` has one entry a choice, in the order of their index."""

    requests: tuple[ChatRequest, ...]
    stream: bool
    encoder: Encoder
    renamed: Mapping[str, str] = field(default_factory=dict)
    """What fields of a ChatRequest are called in this body, so that an error can name what the client wrote."""


class Reply:
    """Sends what one request is answered with."""

    def __init__(self, send: Send, request_id: str, source: Source, shape: Shape) -> None:
        self.source: Source = source
        self.started = False
        self._send = send
        self._headers: list[Header] = [(b"x-request-id", request_id.encode())]
        self._shape = shape
        self._last_words: Callable[[CausewayError], bytes] | None = None
        self._writes_since: float | None = None

    def patience(self, now: float) -> float:
        """Seconds from `now` on that the client has left to read what is being written; not over 0: it had its time."""
        return SEND_TIMEOUT if self._writes_since is None else self._writes_since + SEND_TIMEOUT - now

    async def stream(
        self, media_type: bytes, last_words: Callable[[CausewayError], bytes], route: Route | None = None
    ) -> None:
        """Begin a body of unknown length. `last_words` are what it ends with if it fails."""
        self._last_words = last_words
        await self._start(media_type, route, [(b"cache-control", b"no-cache")])

    async def write(self, body: bytes, *, more: bool) -> None:
        self._writes_since = asyncio.get_running_loop().time()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._writes_since = None

    async def whole(self, body: bytes, route: Route | None = None) -> None:
        await self._start(JSON, route, [(b"content-length", b"%d" % len(body))])
        await self.write(body, more=False)

    async def fail(self, error: CausewayError) -> None:
        if self._last_words is not None:
            await self.write(self._last_words(error), more=False)
        elif not self.started:
            self.started = True
            await send_error(self._send, error, self._headers, shape=self._shape)

    async def _start(self, media_type: bytes, route: Route | None, extra: list[Header]) -> None:
        self.started = True
        headers = [(b"content-type", media_type), *self._headers, *extra, *_route_headers(route)]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})


Work = Callable[[Reply], Coroutine[Any, Any, None]]


class Endpoint(Generic[_T]):
    """ASGI endpoint. `admit` says by the headers who works for this request, before its body is read; `begin` reads the
    body. Both raise what is refused. The work runs until it is done or the client leaves."""

    def __init__(
        self,
        admit: Callable[[Mapping[str, str]], _T],
        begin: Callable[[_T, Asked], Work],
        *,
        source: Source,
        shape: Shape,
    ) -> None:
        self._admit = admit
        self._begin = begin
        self._source: Source = source
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        own_id = f"req_{uuid.uuid4().hex}"
        request_id = headers.get("x-request-id") or own_id
        try:
            admitted = self._admit(headers)
            _check_id(request_id)
            work = self._begin(admitted, Asked(headers, await _read_body(receive), own_id))
        except _Left:
            return
        reply = Reply(send, request_id, self._source, self._shape)
        try:
            await _while_connected(_typed(work, reply), reply, receive)
        except asyncio.CancelledError:
            # The server stops and gave this request up: say so, rather than cut it.
            await reply.fail(Overloaded("the server is stopping", source=self._source, retry_after=1))


def generating(read: Callable[[Asked], Generation], *, media_type: bytes = EVENTS) -> Callable[[Answer, Asked], Work]:
    """What an Endpoint begins for a body that asks for an answer. `media_type` is that of a stream."""
    return lambda answer, asked: answering(answer, read(asked), media_type=media_type)


def answering(answer: Answer, call: Generation, *, media_type: bytes = EVENTS) -> Work:
    return lambda reply: _generate(answer, call, media_type, reply)


async def consume(
    answer: Answer,
    requests: Sequence[ChatRequest],
    take: Callable[[int, Delta], Awaitable[None]],
    *,
    renamed: Mapping[str, str],
) -> None:
    """Every delta of all choices, as it comes, each with its choice's index. Raises DeadlineExceeded, and what the
    answer raises, with the field as the client wrote it (`renamed`)."""
    limit = requests[0].deadline_s
    # Whoever answers keeps the deadline; one that does not is not waited for.
    deadline = asyncio.timeout(None if limit is None else limit + DEADLINE_GRACE)
    try:
        async with aclosing(merged(answer, requests)) as deltas, deadline:
            async for index, delta in deltas:
                await take(index, delta)
    except CausewayError as error:
        error.param = renamed.get(error.param or "", error.param)
        raise
    except TimeoutError:
        if deadline.expired():
            raise DeadlineExceeded("the deadline has passed") from None
        raise


async def _generate(answer: Answer, call: Generation, media_type: bytes, reply: Reply) -> None:
    encoder, held, requests = call.encoder, b"", call.requests
    if call.stream and len(requests) == 1:
        requests = (msgspec.structs.replace(requests[0], streamed=True),)

    async def take(index: int, delta: Delta) -> None:
        nonlocal held
        held += encoder.push(index, delta)
        if not call.stream:
            return
        if not reply.started:
            if not (delta.tokens or delta.text or delta.tool_calls or delta.finish_reason):
                return  # nothing of the answer yet: an error still can have its own status
            await reply.stream(media_type, encoder.fail, delta.route)
        if held:
            await reply.write(held, more=True)
            held = b""

    await consume(answer, requests, take, renamed=call.renamed)
    held += encoder.end()
    await (reply.write(held, more=False) if call.stream else reply.whole(held, encoder.route))


async def _typed(work: Work, reply: Reply) -> None:
    """Whatever happens, the client gets the end of its reply or an explicit error."""
    try:
        await work(reply)
    except SlowConsumer:
        raise  # no use to tell who does not read: the connection is cut
    except Exception as error:
        await reply.fail(typed(error, reply.source))


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


async def _while_connected(work: Coroutine[Any, Any, None], reply: Reply, receive: Receive) -> None:
    """Run `work` to its end, or until the client leaves or this task is cancelled; leaves nothing running. Raises
    SlowConsumer if the client does not read."""
    tasks = {asyncio.create_task(work), asyncio.create_task(_disconnected(receive))}
    ended: set[asyncio.Task[None]] = set()
    try:
        while not ended:  # one timer for all writes, not one each: most of them do not wait
            left = reply.patience(asyncio.get_running_loop().time())
            if left <= 0:
                raise SlowConsumer("the client stopped reading", source=reply.source)
            ended, _ = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
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
    if route.cached:
        values["cache"] = route.cached.use
    headers = [(f"x-causeway-{name}".encode(), _header_value(value)) for name, value in values.items()]
    if route.cached and route.cached.use == "hit":
        headers.append((b"age", b"%d" % route.cached.age_s))
    return headers


def _header_value(text: str) -> bytes:
    """Printable ASCII of bounded length: no reason, whatever it holds, can start another header."""
    return "".join(char if " " <= char <= "~" else "?" for char in text[:MAX_HEADER_VALUE]).strip().encode()
