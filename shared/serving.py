"""How a daemon listens, and how it stops: bind, say so, serve, and on SIGTERM drain before closing."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from shared.binding import Tls
from shared.config import InvalidSettings
from shared.guard import MAX_HEADER_BYTES

HEADER_TIMEOUT = 10.0
"""Seconds a client may take for a request's line and headers."""
KEEP_ALIVE = 120
MAX_CONNECTIONS = 1024
WS_PING_INTERVAL, WS_PING_TIMEOUT = 20.0, 40.0
CLOSE_S = 5
"""Seconds for the last words to requests that did not end while draining."""

_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    on_listening: Callable[[str], None] | None = None,
    tls: Tls | None = None,
    drain: Callable[[], Awaitable[None]] | None = None,
    drain_s: float = 20.0,
    ws_max_size: int = 1 << 20,
    header_timeout: float = HEADER_TIMEOUT,
    listener: socket.socket | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT (or until `stop` is set; then signals are left alone).

    Once it listens, `on_listening(url)` is called; by default it prints `listening on URL`. Stopping is staged: `drain`
    (refuse new requests, finish those that run) for at most `drain_s`, then what still runs is cancelled and told so,
    then connections close. A second signal ends the draining. Raises InvalidSettings if the address cannot be bound;
    a caller with slow work to do first calls `bind` itself and passes the `listener`.
    """
    listener = listener or bind(host, port)
    url = f"{'https' if tls else 'http'}://{_in_url(host)}:{listener.getsockname()[1]}"
    server = _Server(_config(app, tls, ws_max_size, header_timeout), lambda: (on_listening or announce)(url))
    with contextlib.nullcontext(stop) if stop else _signals() as stopping:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopped = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                stopping.clear()
                await _drained(drain, drain_s, stopping)
        finally:
            await _close(server, serving)
            stopped.cancel()
            listener.close()


def announce(url: str) -> None:
    """Tools wait for this line."""
    sys.stdout.write(f"listening on {url}\n")
    sys.stdout.flush()


class _Server(uvicorn.Server):
    """uvicorn, told when to stop by `serve` instead of by signals, and telling when it listens."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another process was bound to it too, and was faster
            raise InvalidSettings(f"cannot listen: {error.strerror}", param="port") from error
        self._on_started()


class Connection(h11.Connection):
    """Frames the chunks of a stream itself: once its headers are out nothing about them is left to check, and h11 takes
    a third of what the whole daemon does for one."""

    _chunked = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # of overloads that say which events
        if self._chunked and isinstance(event, h11.Data):
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        sent = super().send(event)
        chunked = b"\r\ntransfer-encoding: chunked\r\n" in (sent or b"").lower()
        self._chunked = isinstance(event, h11.Response) and chunked
        return sent


class BoundedHttp(H11Protocol):
    """h11 that does not wait for ever for a request's headers; uvicorn itself has no such limit."""

    header_timeout = HEADER_TIMEOUT
    _headers_due: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = Connection(h11.SERVER, MAX_HEADER_BYTES)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_headers()
        else:
            self._have_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_headers()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        if self._headers_due is None:
            self._headers_due = self.loop.call_later(self.header_timeout, self._headers_late)

    def _have_headers(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _headers_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_TIMED_OUT)
            self.transport.close()


def _config(app: ASGIApp, tls: Tls | None, ws_max_size: int, header_timeout: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=type("BoundedHttp", (BoundedHttp,), {"header_timeout": header_timeout}),
        ws="websockets-sansio",
        ws_max_size=ws_max_size,
        ws_per_message_deflate=False,
        ws_ping_interval=WS_PING_INTERVAL,
        ws_ping_timeout=WS_PING_TIMEOUT,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=CLOSE_S,
        limit_concurrency=MAX_CONNECTIONS,
        proxy_headers=False,  # nobody in front of us is trusted to say who the client is
        server_header=False,
        access_log=False,
        log_config=None,
        log_level="warning",
        ssl_certfile=tls.cert if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket that owns the address, but does not listen yet. Raises InvalidSettings."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise InvalidSettings(f"cannot listen on {host}: {error.strerror}", param="host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InvalidSettings(f"cannot listen on {host}:{port}: {error.strerror}", param="port") from error
    return listener


def _in_url(host: str) -> str:
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


@contextlib.contextmanager
def _signals() -> Iterator[asyncio.Event]:
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        yield stopping
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _drained(drain: Callable[[], Awaitable[None]] | None, limit: float, hurry: asyncio.Event) -> None:
    """Returns when `drain` has, or `limit` has passed, or the user is in a hurry."""
    if drain is None:
        return
    tasks = {asyncio.ensure_future(drain()), asyncio.create_task(hurry.wait())}
    await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _close(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    """Cancel what still runs, give it time to say so, then close every connection."""
    server.should_exit = True
    left = list(server.server_state.tasks)
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=CLOSE_S)
    await serving
