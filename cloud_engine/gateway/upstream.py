"""Another OpenAI-compatible server (vLLM, SGLang, TGI, llama-server, Causeway itself) as the engine behind the gateway.

Each request has a connection to itself, a *lane*: an httpx transport that holds one connection. A lane whose answer was
read to its end is kept for the next request; every other one is closed at once, which is how the upstream learns of a
cancel. A pool shared by all requests would lose slots to cancellations (httpcore 1.0.9); here nothing is shared. And a
transport, unlike a client, follows no redirect, keeps no cookie and reads no environment: the key goes to the
configured address and nowhere else.
"""

import asyncio
import contextlib
import hashlib
import math
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import structlog
from msgspec import Struct

from cloud_engine.gateway.completions import ChunkReader, fields_of, path_of
from cloud_engine.gateway.events import EventStream
from cloud_engine.gateway.names import VIRTUAL_MODELS
from cloud_engine.gateway.refusals import refused
from shared.config import InvalidSettings
from shared.errors import CausewayError, DeadlineExceeded, Overloaded, PolicyDenied, Unreachable, UpstreamFailed
from shared.schemas import ChatRequest, Delta, ModelCard

MAX_IDLE_LANES = 32
KEEPALIVE_S = 3.0
"""How long an unused connection is trusted: less than the 5 s after which the usual servers close theirs."""
MAX_REFUSAL = 64 << 10
MAX_MODELS = 1 << 20
MAX_OTHERS, MAX_NAME = 256, 200
"""How many models of an upstream are listed, and how long their names may be."""
MAX_STREAM = 256 << 20
"""Bytes of a whole streamed answer."""
REFUSAL_S = 5.0
REST_S = 1.0

_PLAIN_ID = re.compile(r"[A-Za-z0-9._:-]{1,120}")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `first_token` counts from the start of the request, `idle` from one piece of the answer to the next."""

    connect: float = 5.0
    first_token: float = 120.0
    idle: float = 60.0


@dataclass(frozen=True, slots=True)
class UpstreamStats:
    """`waiting` have had no token yet. Of the upstream's own batches and caches nothing is known here."""

    running: int
    waiting: int
    generated_tokens: int


class _Model(Struct):
    id: str
    context_length: int | None = None  # Causeway
    max_model_len: int | None = None  # vLLM, SGLang


class _Models(Struct):
    data: list[_Model]


class Upstream:
    """Answers requests with the server at `base_url` (`http://HOST:PORT/v1`), where the model is called `model`.

    `context_length` 0: the upstream is asked for it at `start`. At most `concurrent` requests at once, more are refused
    as overloaded. With `cache_salt` each tenant's prompts carry a salt of their own (vLLM's field; other servers may
    refuse it); without it tenants share the upstream's prefix cache.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str = "",
        *,
        context_length: int = 0,
        timeouts: Timeouts | None = None,
        concurrent: int = 320,
        cache_salt: bool = False,
        verify: ssl.SSLContext | None = None,
        probe_s: float = 10.0,
    ) -> None:
        self._base, self._model = base_url.rstrip("/"), model
        self._headers = {"accept-encoding": "identity", "user-agent": "causeway"}
        self._headers |= {"authorization": f"Bearer {key}"} if key else {}
        self._context_length = context_length
        self._others: dict[str, ModelCard] = {}
        """Further models that it serves, by their names."""
        self._timeouts = timeouts or Timeouts()
        self._concurrent, self._cache_salt, self._probe_s = concurrent, cache_salt, probe_s
        # Making one that trusts the system's certificates takes long; an http:// address never uses it.
        plain = self._base.startswith("http://")
        self._verify = verify or (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else ssl.create_default_context())
        self._idle: list[httpx.AsyncHTTPTransport] = []
        self._live: dict[httpx.AsyncHTTPTransport, bool] = {}
        """Lanes in use, and whether their answer has begun."""
        self._generated = 0
        self._closed = False
        self._failure: CausewayError | None = None
        self._prober: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ask the upstream what it serves. Raises InvalidSettings if its context length is needed and cannot be had."""
        await self.watch()
        if not self._context_length:
            reason = self._failure.message if self._failure else "the upstream does not say its context length"
            raise InvalidSettings(f"{reason}: give model_len to start all the same", param="model_len")

    async def watch(self) -> None:
        """Ask the upstream what it serves, now and every `probe_s` seconds; it may be away."""
        await self._probe()
        self._prober = asyncio.create_task(self._probe_forever())

    async def aclose(self) -> None:
        """Close every connection; live requests end with Overloaded. Idempotent."""
        self._closed = True
        if self._prober is not None:
            self._prober.cancel()
            await asyncio.gather(self._prober, return_exceptions=True)
        idle, self._idle = self._idle, []
        for lane in (*idle, *self._live):
            await lane.aclose()

    @property
    def failure(self) -> CausewayError | None:
        """Why the upstream did not answer when it was last asked what it serves, every `probe_s` seconds; or None."""
        return self._failure

    def stats(self) -> UpstreamStats:
        running = sum(self._live.values())
        return UpstreamStats(running, len(self._live) - running, self._generated)

    def model_card(self) -> ModelCard:
        return ModelCard(id=self._model, context_length=self._context_length)

    def other_cards(self) -> tuple[ModelCard, ...]:
        """What else it serves, as it last said; requests may name these too."""
        return tuple(self._others.values())

    async def answer(self, request: ChatRequest, *, salt: str = "") -> AsyncGenerator[Delta, None]:
        """Deltas of one request; closing the generator closes the connection. `salt` is the tenant."""
        if request.label == "edge_only":
            raise PolicyDenied("a request labelled edge_only must not be passed on", param="label", source="cloud")
        other = self._others.get(request.model)
        model, length = (other.id, other.context_length) if other else (self._model, self._context_length)
        fields = fields_of(request, model, length)
        if self._cache_salt:
            fields["cache_salt"] = hashlib.sha256(f"causeway:{salt}".encode()).hexdigest()
        reader = ChunkReader(request, fields)
        async with self._lane() as lane, aclosing(self._exchange(lane, request, fields, reader)) as deltas:
            async for delta in deltas:
                self._live[lane.transport] = True
                self._generated += delta.tokens
                yield delta

    async def _exchange(
        self, lane: "_Lane", request: ChatRequest, fields: dict[str, Any], reader: ChunkReader
    ) -> AsyncGenerator[Delta, None]:
        clock = asyncio.get_running_loop().time
        late = clock() + (math.inf if request.deadline_s is None else request.deadline_s)
        give_up = min(late, clock() + self._timeouts.first_token)
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        headers |= {"x-request-id": request.id} if _PLAIN_ID.fullmatch(request.id) else {}
        async with self._in_time(give_up):
            reply = await self._send(lane, "POST", path_of(request), headers, msgspec.json.encode(fields))
        try:
            await self._check(reply, fields, give_up)
            events, pieces, size = EventStream(), reply.aiter_raw(), 0
            while not reader.done:
                async with self._in_time(give_up):
                    piece = await anext(pieces, None)
                if piece is None:
                    break
                if (size := size + len(piece)) > MAX_STREAM:
                    raise UpstreamFailed("the upstream's answer does not end", source="cloud")
                for event in events.feed(piece):
                    if not reader.done and (delta := reader.read(event)) is not None:
                        yield delta
                    give_up = min(late, clock() + self._timeouts.idle) if reader.tokens else give_up
            yield reader.last()
            lane.clean = await _at_end(pieces)
        finally:
            await reply.aclose()

    async def _send(
        self, lane: "_Lane", method: str, path: str, headers: dict[str, str], body: bytes | None = None
    ) -> httpx.Response:
        timeout = {"connect": self._timeouts.connect, "read": None, "write": None, "pool": None}
        request = httpx.Request(
            method,
            f"{self._base}/{path}",
            headers=self._headers | headers,
            content=body,
            extensions={"timeout": timeout},
        )
        return await lane.transport.handle_async_request(request)

    async def _check(self, reply: httpx.Response, fields: dict[str, Any], give_up: float) -> None:
        """Raises what a reply that is no event stream means."""
        if reply.status_code != 200:
            limit = min(give_up, asyncio.get_running_loop().time() + REFUSAL_S)
            body = b""
            with contextlib.suppress(CausewayError):  # the status alone says enough
                async with self._in_time(limit):
                    body = await _whole(reply, MAX_REFUSAL)
            raise refused(reply.status_code, body, reply.headers.get("retry-after"), fields=fields)
        kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "text/event-stream" or reply.headers.get("content-encoding", "identity") != "identity":
            raise UpstreamFailed("the upstream's answer is no event stream", source="cloud")

    @asynccontextmanager
    async def _in_time(self, give_up: float) -> AsyncIterator[None]:
        """What may fail or take too long at the other end fails as a typed error; its text holds nothing of httpx's."""
        try:
            async with asyncio.timeout_at(give_up):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded("the upstream sent nothing for too long", source="cloud") from error
        except (httpx.HTTPError, OSError) as error:
            if self._closed:
                raise Overloaded("the server is stopping", source="cloud", retry_after=5.0) from error
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                raise Unreachable("the upstream cannot be reached", source="cloud") from error
            raise UpstreamFailed("the connection to the upstream broke", source="cloud") from error

    # Lanes

    @asynccontextmanager
    async def _lane(self) -> AsyncIterator["_Lane"]:
        if self._closed:
            raise Overloaded("the server is stopping", source="cloud", retry_after=5.0)
        if len(self._live) >= self._concurrent:
            raise Overloaded(f"{self._concurrent} requests are with the upstream", source="cloud", retry_after=1.0)
        lane = _Lane(self._idle.pop() if self._idle else self._open())
        self._live[lane.transport] = False
        try:
            yield lane
        finally:
            del self._live[lane.transport]
            if lane.clean and not self._closed and len(self._idle) < MAX_IDLE_LANES:
                self._idle.append(lane.transport)
            else:
                await lane.transport.aclose()

    def _open(self) -> httpx.AsyncHTTPTransport:
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE_S)
        return httpx.AsyncHTTPTransport(verify=self._verify, trust_env=False, limits=limits)

    # Health

    async def _probe_forever(self) -> None:
        while True:
            await asyncio.sleep(self._probe_s)
            await self._probe()

    async def _probe(self) -> None:
        """Ask for the models: any answer but a refused key or a failure is a sign of life."""
        before = self._failure
        try:
            models = await self._models()
        except CausewayError as error:
            self._failure = error
        else:
            self._failure = None
            self._learn(models)
        if type(before) is not type(self._failure):
            log = structlog.get_logger("causeway.upstream")
            log.warning("upstream_down", reason=self._failure.message) if self._failure else log.info("upstream_up")

    async def _models(self) -> list[_Model]:
        give_up = asyncio.get_running_loop().time() + self._timeouts.connect + REFUSAL_S
        lane = _Lane(self._open())
        try:
            async with self._in_time(give_up):
                reply = await self._send(lane, "GET", "models", {"accept": "application/json"})
                body = await _whole(reply, MAX_MODELS)
        finally:
            await lane.transport.aclose()
        if reply.status_code in (401, 403) or reply.status_code >= 500:
            raise refused(reply.status_code, body, None, fields={})
        try:
            return msgspec.json.decode(body, type=_Models).data
        except (ValueError, RecursionError):
            return []

    def _learn(self, models: list[_Model]) -> None:
        """A server with one model has the one we mean, whatever it calls it."""
        ours = [one for one in models if one.id == self._model] or (models if len(models) == 1 else [])
        if ours and not self._context_length:
            self._context_length = _length(ours[0])
        plain = [one for one in models[:MAX_OTHERS] if one.id.isprintable() and len(one.id) <= MAX_NAME]
        others = [one for one in plain if one not in ours and one.id not in (self._model, *VIRTUAL_MODELS)]
        self._others = {one.id: ModelCard(id=one.id, context_length=_length(one)) for one in others}


def _length(model: _Model) -> int:
    return max(0, model.context_length or model.max_model_len or 0)


@dataclass(slots=True)
class _Lane:
    transport: httpx.AsyncHTTPTransport
    clean: bool = False
    """Its answer was read to the end, so that the connection can serve another."""


async def _whole(reply: httpx.Response, limit: int) -> bytes:
    """The body, or as much of it as `limit` permits."""
    body = b""
    async with aclosing(reply):
        async for piece in reply.aiter_raw():
            body += piece
            if len(body) > limit:
                break
    return body[:limit]


async def _at_end(pieces: AsyncIterator[bytes]) -> bool:
    try:
        async with asyncio.timeout(REST_S):
            return await anext(pieces, None) is None
    except (TimeoutError, httpx.HTTPError):
        return False
