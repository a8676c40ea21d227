"""The gateway: the engine behind keys and limits, over HTTP and over the WebSocket, and its metrics."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import msgspec
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cloud_engine.gateway.fleet import Fleet
from cloud_engine.gateway.fleet_admin import fleet_routes
from cloud_engine.gateway.limits import Limiter, TenantLimits
from cloud_engine.gateway.names import VIRTUAL_MODELS
from cloud_engine.gateway.socket import SocketEndpoint
from shared.embeddings import Embed, EmbeddingRequest, Embeddings
from shared.errors import CausewayError, Overloaded, UnknownModel, UnsupportedParameter
from shared.executions import Rules
from shared.frames import Limits
from shared.guard import Guard
from shared.http import create_app
from shared.keys import Keys
from shared.schemas import Answer, ChatRequest, Delta, ModelCard, Route, Usage
from shared.telemetry import Listener, RequestFinished, RequestMetrics, observed

LOCAL_TENANT = "local"
PROMPT_CHARS_PER_TOKEN = 4
UNBOUNDED_OUTPUT = 512
"""Tokens reserved for a request that names no `max_tokens`; settled by what it uses."""

_GAUGES = (
    "running", "held", "waiting", "waiting_batch", "kv_blocks_used", "kv_blocks_total",
    "host_blocks_used", "host_blocks_total", "prefix_hit_rate",
)  # fmt: skip
_COUNTERS = (
    "prefix_hit_tokens", "prefix_host_hit_tokens", "prefix_query_tokens", "swapped_out_blocks", "swapped_in_blocks",
    "preemptions", "expired", "generated_tokens", "drafted_tokens", "accepted_tokens",
    "embedded_tokens",
)  # fmt: skip


class EngineStats(Protocol):
    """A snapshot of the engine. What else of `_GAUGES` and of `_COUNTERS` (totals since its start) it has is a metric
    too: an engine on another machine may know nothing of blocks."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...


class ServedEngine(Protocol):
    """What the gateway needs of an engine: an Answer that keeps tenants apart, and its state."""

    @property
    def failure(self) -> CausewayError | None:
        """Why it answers no more, or None while it does."""

    def stats(self) -> EngineStats: ...

    def answer(self, request: ChatRequest, *, salt: str = "") -> AsyncGenerator[Delta, None]:
        """`salt`: only requests with the same one share cached prefixes, so that no tenant can time another's."""


@runtime_checkable
class EmbeddingEngine(Protocol):
    """An engine that can turn texts into vectors, too."""

    async def embed(self, request: EmbeddingRequest, *, salt: str = "") -> Embeddings: ...


class Backend(ServedEngine, Protocol):
    """An engine with a life of its own: what `cloud-engine serve` starts, puts a Gateway in front of, and closes."""

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...

    def model_card(self) -> ModelCard:
        """Known once it is started."""


class Gateway:
    """Everything between a socket and the engine. `app` is the ASGI application to serve.

    `card` is what the virtual models mean too; `others` may be asked for by name, as an upstream has them.
    `fleet` holds policies for the edges that ask for them.
    Without `keys`, whoever can connect is the tenant `local`: for loopback only, see `shared.binding.check_bind`.
    """

    def __init__(
        self,
        engine: ServedEngine,
        card: ModelCard,
        *,
        others: Sequence[ModelCard] = (),
        keys: Keys | None,
        limits: TenantLimits,
        guard: Guard,
        registry: CollectorRegistry,
        listeners: tuple[Listener, ...] = (),
        fleet: Fleet | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.draining = False
        self._engine = engine
        self._card = card
        self._keys = keys
        self._limiter = Limiter(limits)
        self._clock = clock
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._listeners = (RequestMetrics(registry), *listeners)
        registry.register(EngineCollector(engine))
        names = dict.fromkeys((card.id, *VIRTUAL_MODELS))  # another Causeway's model may be called `cloud` itself
        self._others = {other.id: other for other in others if other.id not in names}
        self.cards = (*(msgspec.structs.replace(card, id=name) for name in names), *self._others.values())
        self._socket = SocketEndpoint(
            answer_for=self._tenants_answer,
            authenticate=self._tenant_of,
            rules=Rules(limits=Limits(max_prompt=guard.max_body), models=self.cards),
            origins=guard.origins,
            listeners=self._listeners,
            fleet=fleet,
            max_connections=limits.connections,
        )
        self.app = self._build_app(guard, registry)
        if fleet is not None and fleet.admins is not None:
            self.app.router.routes += fleet_routes(fleet, fleet.admins)

    async def drain(self, limit_s: float) -> None:
        """Take nothing new; return when nothing runs and the sockets are told, or after `limit_s` seconds."""
        self.draining = True
        await asyncio.gather(self._socket.drain(limit_s), self._wait_idle(limit_s))

    def health(self) -> dict[str, Any]:
        stats = self._engine.stats()
        status = "draining" if self.draining else "failed" if self._engine.failure else "ok"
        return {"status": status, "model": self._card.id, "running": stats.running, "waiting": stats.waiting}

    def _build_app(self, guard: Guard, registry: CollectorRegistry) -> FastAPI:
        app = create_app(
            answer_for=self._http_answer,
            models=lambda: self.cards,
            health=self.health,
            registry=registry,
            source="cloud",
            guard=guard,
            embed_for=self._embed_for,
        )
        app.router.routes.append(self._socket.route())
        return app

    def _tenant_of(self, headers: Mapping[str, str]) -> str:
        return self._keys.tenant_of(headers) if self._keys else LOCAL_TENANT

    def _http_answer(self, headers: Mapping[str, str]) -> Answer:
        return _Observed(self._tenants_answer(self._tenant_of(headers)), self._listeners, self._clock)

    def _embed_for(self, headers: Mapping[str, str]) -> Embed:
        return partial(self.embed, tenant=self._tenant_of(headers))

    def _tenants_answer(self, tenant: str) -> "TenantAnswer":
        return TenantAnswer(self, tenant)

    async def answer(self, request: ChatRequest, tenant: str) -> AsyncGenerator[Delta, None]:
        """One request of one tenant: admitted, counted, answered by the engine, its route said."""
        with self._admitted(request.model, tenant, _reservation(request)) as bill:
            first = True
            async with aclosing(self._engine.answer(request, salt=tenant)) as deltas:
                async for delta in deltas:
                    bill.used = _total(delta.usage) if delta.usage else bill.used + delta.tokens
                    yield self._said(delta, request.model, first=first)
                    first = False

    async def embed(self, request: EmbeddingRequest, *, tenant: str) -> Embeddings:
        """One request of one tenant for vectors: admitted, counted, reported as one usage event."""
        start = self._clock()
        event = RequestFinished(request.id, request.model, "cancelled", 0.0, tenant=tenant)
        try:
            made = await self._embed(request, tenant)
            usage = Usage(prompt_tokens=made.prompt_tokens, completion_tokens=0)
            event = replace(event, outcome="done", usage=usage)
        except Exception as error:
            code = error.code if isinstance(error, CausewayError) else "internal"
            event = replace(event, outcome="error", error_code=code)
            raise
        finally:
            event = replace(event, total_s=self._clock() - start)
            for listener in self._listeners:
                listener(event)
        return made

    async def _embed(self, request: EmbeddingRequest, tenant: str) -> Embeddings:
        engine = self._engine
        if not isinstance(engine, EmbeddingEngine) or request.model in self._others:
            raise UnsupportedParameter("this model has no embeddings here", param="model", source="cloud")
        with self._admitted(request.model, tenant, request.size // PROMPT_CHARS_PER_TOKEN) as bill:
            made = await engine.embed(request, salt=tenant)
            bill.used = made.prompt_tokens
            return made

    @contextmanager
    def _admitted(self, model: str, tenant: str, reserved: int) -> Iterator["_Bill"]:
        """Counts a request in, or raises; and out again, with what it used by then."""
        if self.draining:
            raise Overloaded("the server is draining", source="cloud", retry_after=1.0)
        self._check_model(model)
        bill = _Bill()
        self._limiter.enter(tenant, reserved, self._clock())
        self._count(1)
        try:
            yield bill
        finally:
            self._limiter.leave(tenant, reserved, bill.used)
            self._count(-1)

    def _check_model(self, model: str) -> None:
        names = [card.id for card in self.cards]
        if model not in names:
            raise UnknownModel(f"no such model here; there are {', '.join(names)}", param="model", source="cloud")

    def _said(self, delta: Delta, asked: str, *, first: bool) -> Delta:
        """The first and the last delta say who answers."""
        if not first and delta.finish_reason is None:
            return delta
        model = asked if asked in self._others else self._card.id
        return msgspec.structs.replace(delta, route=Route(target="cloud", reason="requested", model=model))

    def _count(self, by: int) -> None:
        self._running += by
        if self._running:
            self._idle.clear()
        else:
            self._idle.set()

    async def _wait_idle(self, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            return


@dataclass(slots=True)
class _Bill:
    """Tokens that a request has used so far."""

    used: int = 0


class TenantAnswer:
    """The engine, as one tenant sees it."""

    def __init__(self, gateway: Gateway, tenant: str) -> None:
        self._gateway = gateway
        self.tenant = tenant

    def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        return self._gateway.answer(request, self.tenant)


class _Observed:
    """Over HTTP, each request is one usage event; over the socket its endpoint sees to that."""

    def __init__(self, inner: TenantAnswer, listeners: tuple[Listener, ...], clock: Callable[[], float]) -> None:
        self._inner = inner
        self._listeners = listeners
        self._clock = clock

    def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        deltas = self._inner.answer(request)
        return observed(deltas, request, self._listeners, tenant=self._inner.tenant, clock=self._clock)


class EngineCollector(Collector):
    """The engine's own numbers, read when somebody asks for the metrics."""

    def __init__(self, engine: ServedEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for names, family in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for name in names:
                if (value := getattr(stats, name, None)) is not None:
                    yield family(f"causeway_engine_{name}", _title(name), value=value)


def _title(name: str) -> str:
    return f"{name.replace('_', ' ').replace('kv', 'KV').capitalize()} of the engine"


def _reservation(request: ChatRequest) -> int:
    """Tokens charged before the request is tokenized; settled by its real usage."""
    return request.size // PROMPT_CHARS_PER_TOKEN + (request.sampling.max_tokens or UNBOUNDED_OUTPUT)


def _total(usage: Usage) -> int:
    return usage.prompt_tokens + usage.completion_tokens
