"""OpenAI's Responses over a WebSocket: `response.create` in, the same events as over HTTP out, one JSON text each.

One response at a time on a connection; the next may go on from the latest also where it was not to be stored. Whoever
leaves is not computed for. Host and Origin are the guard's to check, the key is checked before the upgrade.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from edge_agent.api.responses.read import RENAMED, ResponsesCall, Turn
from edge_agent.api.responses.write import Events
from shared.errors import BadRequest, CausewayError, Overloaded, RequestConflict, SlowConsumer, UnsupportedParameter
from shared.guard import refuse_websocket, typed
from shared.openai import json_object
from shared.replies import error_object
from shared.schemas import Answer, Delta
from shared.surface import SEND_TIMEOUT, consume

LAST_WORDS_S = 1.0
ONLY_HERE = {"type": "response.create", "generate": True}
"""Fields of a message that the body of a POST has not, and the values that say nothing."""


Admit = Callable[[Mapping[str, str]], tuple[str, Answer]]


class Read(Protocol):
    def __call__(
        self, raw: dict[str, Any], *, request_id: str, label: str | None, tenant: str, latest: dict[str, Turn]
    ) -> tuple[ResponsesCall, Events]: ...


class Socket:
    """ASGI endpoint. `admit` says by the headers whose requests these are and who answers one, or raises: it is asked
    again for each, so that a key that is taken back opens nothing more."""

    def __init__(self, admit: Admit, read: Read) -> None:
        self._admit = admit
        self._read = read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        headers = Headers(scope=scope)
        try:
            self._admit(headers)
        except CausewayError as error:
            await refuse_websocket(scope, send, error.at("edge"))
            return
        await send({"type": "websocket.accept"})
        connection = _Connection(headers, self._admit, self._read, send)
        try:
            while (message := await receive())["type"] != "websocket.disconnect":
                await connection.take(message)
        except (SlowConsumer, OSError):
            await connection.cut()
        finally:
            await connection.close()


class _Connection:
    def __init__(self, headers: Mapping[str, str], admit: Admit, read: Read, send: Send) -> None:
        self._headers = headers
        self._admit = admit
        self._read = read
        self._raw_send = send
        self._sending = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None
        self._answering = False
        self._latest: dict[str, Turn] = {}

    async def take(self, message: Mapping[str, Any]) -> None:
        """One message of the client. What is wrong with it is said, and the connection goes on."""
        try:
            if self._answering:
                raise RequestConflict("one response at a time on a connection", source="edge")
            if self._running is not None:
                await asyncio.wait({self._running})  # it is saying its last words
            tenant, answer = self._admit(self._headers)
            call, events = self._parsed(message, tenant)
        except CausewayError as error:
            await self._say_error(error.at("edge"))
        else:
            self._answering = True
            self._running = asyncio.create_task(self._respond(answer, call, events))

    async def close(self) -> None:
        """Ends what runs. The client is gone, or the server stops and says so."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def cut(self) -> None:
        """On a client that reads nothing, or has gone in the middle of a word."""
        with suppress(OSError):
            await self._raw_send({"type": "websocket.close", "code": 1008})

    def _parsed(self, message: Mapping[str, Any], tenant: str) -> tuple[ResponsesCall, Events]:
        text = message.get("text")
        if text is None:
            raise BadRequest("a message must be JSON text")
        raw = json_object(text.encode("utf-8", "surrogatepass"))
        if raw.get("type") != "response.create":
            raise UnsupportedParameter("only response.create is supported", param="type")
        for name, neutral in ONLY_HERE.items():
            if raw.pop(name, neutral) != neutral:
                raise UnsupportedParameter(f"{name} is not supported", param=name)
        request_id = f"req_{uuid.uuid4().hex}"
        label = self._headers.get("x-causeway-label")
        return self._read(raw, request_id=request_id, label=label, tenant=tenant, latest=self._latest)

    async def _respond(self, answer: Answer, call: ResponsesCall, events: Events) -> None:
        try:
            await self._answer(answer, call, events)
        except (SlowConsumer, OSError):
            await self.cut()

    async def _answer(self, answer: Answer, call: ResponsesCall, events: Events) -> None:
        begun = False

        async def take(_: int, delta: Delta) -> None:
            nonlocal begun
            begun = True
            await self._say(events.push(delta))

        try:
            await consume(answer, (msgspec.structs.replace(call.request, streamed=True),), take, renamed=RENAMED)
            last = events.end()
            self._answering = False
            await self._say(last)
        except (SlowConsumer, OSError):
            raise
        except asyncio.CancelledError:
            with suppress(Exception):
                async with asyncio.timeout(LAST_WORDS_S):
                    await self._say_error(Overloaded("the server is stopping", source="edge", retry_after=1))
            raise
        except Exception as error:
            self._answering, known = False, typed(error, "edge")
            await (self._say(events.fail(known)) if begun else self._say_error(known))

    async def _say(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            await self._send(msgspec.json.encode(event).decode())

    async def _say_error(self, error: CausewayError) -> None:
        event = {"type": "error", "status": error.status, **error_object(error)}
        await self._send(msgspec.json.encode(event).decode())

    async def _send(self, text: str) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT), self._sending:
                await self._raw_send({"type": "websocket.send", "text": text})
        except TimeoutError as error:
            raise SlowConsumer("the client stopped reading", source="edge") from error
