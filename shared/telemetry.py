"""What happened to each request, as one event; where it goes (metrics, logs) is decided in a `__main__`.

No prompt text, no answer text and no secret can be in an event: it has no field for them.
"""

import contextlib
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, Protocol

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from shared.errors import CausewayError
from shared.schemas import ChatRequest, Delta, Route, Usage

Outcome = Literal["done", "error", "cancelled"]

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """A request reached its one terminal state. Times in seconds; `first_token_s` is None if no token came."""

    request_id: str
    model: str
    outcome: Outcome
    total_s: float
    first_token_s: float | None = None
    usage: Usage | None = None
    route: Route | None = None
    error_code: str | None = None
    tenant: str = "local"
    tokens: int = 0
    """Of the answer, as far as it came."""


class Listener(Protocol):
    """Told of every event, on the event loop: must return at once and not raise."""

    def __call__(self, event: RequestFinished, /) -> None: ...


async def observed(
    deltas: AsyncGenerator[Delta, None],
    request: ChatRequest,
    listeners: tuple[Listener, ...],
    *,
    tenant: str = "local",
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[Delta, None]:
    """Pass a stream through and report exactly one RequestFinished, however it ends."""
    start, first = clock(), None
    last, route, tokens = Delta(), None, 0
    outcome: Outcome = "cancelled"
    code = None
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                first = first or (clock() if delta.tokens else None)
                last, route, tokens = delta, delta.route or route, tokens + delta.tokens
                if delta.finish_reason is not None:
                    outcome = "cancelled" if delta.finish_reason == "cancelled" else "done"
                yield delta
    except CausewayError as error:
        outcome, code = ("cancelled" if error.code == "cancelled" else "error"), error.code
        raise
    except Exception:
        outcome, code = "error", "internal"
        raise
    finally:
        event = RequestFinished(
            request_id=request.id,
            model=request.model,
            outcome=outcome,
            total_s=clock() - start,
            first_token_s=None if first is None else first - start,
            usage=last.usage,
            route=route,
            error_code=code,
            tenant=tenant,
            tokens=tokens,
        )
        for listener in listeners:
            listener(event)


class RequestMetrics:
    """Listener that counts into a Prometheus registry: the same names at the edge and in the cloud."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "causeway_requests", "Finished requests", ("target", "outcome", "code"), registry=registry
        )
        self._failovers = Counter("causeway_failovers", "Fallbacks and failovers to another target", registry=registry)
        self._switches = Counter(
            "causeway_switches", "Answers that went on as another target's, under a mark", registry=registry
        )
        self._tokens = Counter("causeway_tokens", "Tokens processed", ("kind",), registry=registry)
        self._first = Histogram(
            "causeway_first_token_seconds",
            "Time from request to first token",
            ("target",),
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._per_token = Histogram(
            "causeway_output_token_seconds",
            "Mean time per output token after the first, one sample a request",
            ("target",),
            buckets=PER_TOKEN_BUCKETS,
            registry=registry,
        )

    def __call__(self, event: RequestFinished, /) -> None:
        target = event.route.target if event.route else "none"
        switched = event.route.switched if event.route else None
        self._requests.labels(target, event.outcome, event.error_code or "").inc()
        if switched:
            self._switches.inc()
        if event.route and event.route.failovers:
            self._failovers.inc(event.route.failovers)
        if event.route and event.route.cached and event.route.cached.saved:
            return  # no model took this time or made these tokens
        if event.first_token_s is not None:
            self._first.labels(switched.target if switched else target).observe(event.first_token_s)
        if event.usage:
            self._tokens.labels("prompt").inc(event.usage.prompt_tokens)
            self._tokens.labels("cached").inc(event.usage.cached_tokens)
            self._tokens.labels("completion").inc(event.usage.completion_tokens)
            if event.first_token_s is not None and event.usage.completion_tokens > 1 and not switched:
                after_first = event.total_s - event.first_token_s
                self._per_token.labels(target).observe(after_first / (event.usage.completion_tokens - 1))


class RequestLog:
    """Listener that writes one structured line a request."""

    def __init__(self) -> None:
        self._log = structlog.get_logger("causeway.requests")

    def __call__(self, event: RequestFinished, /) -> None:
        self._log.info(
            "request",
            id=event.request_id,
            model=event.model,
            tenant=event.tenant,
            outcome=event.outcome,
            code=event.error_code,
            target=event.route.target if event.route else None,
            reason=event.route.reason if event.route else None,
            failovers=event.route.failovers if event.route else 0,
            cache=event.route.cached.use if event.route and event.route.cached else None,
            switched=event.route.switched is not None if event.route else False,
            first_token_ms=None if event.first_token_s is None else round(event.first_token_s * 1e3, 1),
            total_ms=round(event.total_s * 1e3, 1),
            prompt_tokens=event.usage.prompt_tokens if event.usage else None,
            completion_tokens=event.usage.completion_tokens if event.usage else None,
        )


class Lines(Protocol):
    """Where log lines go: a text stream, or what looks like one."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> None: ...


def set_up_logging(level: str = "info", to: Lines | None = None) -> None:
    """JSON lines (values escaped, so no input can forge a line), by default on stderr. Called from a `__main__`."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_: _Lines(to or sys.stderr),
        cache_logger_on_first_use=False,
    )


class _Lines:
    """Writes lines to a stream. A log that cannot be written (closed, disk full) must not fail what it reports on."""

    def __init__(self, stream: Lines) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()

    debug = info = warning = error = critical = msg
