"""The cloud behind its WebSocket: the only WebSocket client, a thin shell around `shared.link.ClientSession`.

One connection carries all requests. It is made at the first one, kept while there is use for it and, if it breaks, made
again with full jitter; what that means for each request is decided in the session. A request labelled `edge_only` is
refused here before a connection is even tried, and again by the session before bytes exist.

With CAUSEWAY_NO_CLOUD in the environment nothing is connected to and nothing sent, whoever asks: it is read here, at
every request, connection and message, and no argument or setting can undo it.
"""

import asyncio
import logging
import os
import random
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from edge_agent.backends.losses import Losses, Socket, segments
from router.features import UNTROUBLED, Trouble
from shared.binding import is_loopback
from shared.errors import (
    BadRequest,
    CausewayError,
    DeadlineExceeded,
    Forbidden,
    Overloaded,
    PolicyDenied,
    RateLimited,
    Unauthorized,
    Unreachable,
)
from shared.frames import MAX_FRAME, SUBPROTOCOLS, WIRE_PATH, Codec
from shared.offers import Follower
from shared.schemas import ChatRequest, Delta
from shared.session import ClientSession
from shared.streams import ClientRules, Stream

NO_CLOUD = "CAUSEWAY_NO_CLOUD"
BACKOFF_S, MAX_BACKOFF_S = 0.2, 30.0
CLOSE_S = 0.5
POLL_S = 0.02
SHORT_LIFE_S = 1.0
LOOK_S = 1.0
_REFUSALS: dict[int, type[CausewayError]] = {401: Unauthorized, 403: Forbidden, 429: RateLimited, 503: Overloaded}


@dataclass(frozen=True, slots=True)
class Link:
    """The connection to the cloud at one moment."""

    connected: bool
    draining: bool = False
    round_trip_s: float | None = None
    trouble: Trouble = UNTROUBLED
    retry_after_s: float | None = None
    model: str | None = None
    context_length: int | None = None
    last_error: str | None = None
    """The code of what went wrong last; None while connected."""


class CloudBackend:
    """An Answer: the cloud engine at `url` (ws:// only on loopback, unless `allow_plaintext`).

    Before the first token every failure is typed, and retryable where another target may do better; after it the same
    execution is resumed on a new connection, or the stream ends with Unrecoverable. `keep_connected` holds the
    connection while there is no request, so that the first one need not wait for it; `start` begins that. `follower`
    asks for the policies of the cloud's fleet.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        connect_timeout: float = 3.0,
        first_token_timeout: float | None = 60.0,
        resume_ttl: float = 120.0,
        keep_connected: bool = False,
        allow_plaintext: bool = False,
        rules: ClientRules | None = None,
        follower: Follower | None = None,
        subprotocols: tuple[str, ...] = SUBPROTOCOLS,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._url = _checked(url, allow_plaintext)
        self._key = key
        self._connect_timeout = connect_timeout
        self._first_token_timeout = first_token_timeout
        self._keep_connected = keep_connected
        self._subprotocols = [Subprotocol(name) for name in subprotocols]
        self._tls = tls if tls or not self._url.startswith("wss:") else ssl.create_default_context()
        self._clock = clock
        self._jitter = jitter
        rules = replace(rules or ClientRules(), connect_within=connect_timeout, resume_ttl=resume_ttl)
        self._session = ClientSession(rules, "causeway-edge", self._wake, follower)
        self._losses = Losses()
        self._socket: Socket | None = None
        self._looked_at = 0.0
        self._ready = asyncio.Event()
        self._wanted = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._closed = False
        self._logger = _quiet_logger()

    def start(self) -> None:
        """Begin to hold a connection, if `keep_connected`. Harmless when repeated."""
        if self._keep_connected:
            self._ensure_keeper()

    async def reach(self, within: float) -> Link:
        """Connect, and wait until the cloud has greeted and answered a ping. Raises what keeps us from it."""
        _refuse_if_switched_off()
        self._keep_connected = True
        self._ensure_keeper()
        try:
            async with asyncio.timeout(within):
                while not self._session.up or self._session.round_trip is None:
                    if not self._session.up and self._session.last_error is not None:
                        raise self._session.last_error
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            if not self._session.up:
                raise Unreachable(f"the cloud did not greet within {within:g} s", source="cloud") from None
        return self.link()

    def link(self) -> Link:
        """Cheap: looks, never waits; asks the kernel at most once in LOOK_S."""
        session = self._session
        self._look()
        card = session.models[0] if session.models else None
        return Link(
            connected=session.up and not switched_off(os.environ),
            draining=session.draining,
            round_trip_s=session.round_trip,
            trouble=self._losses.reading(self._clock()),
            retry_after_s=session.reconnect_after if session.draining else None,
            model=card.id if card else None,
            context_length=card.context_length if card else None,
            last_error=None if session.up or session.last_error is None else session.last_error.code,
        )

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        """Raises PolicyDenied, without a byte sent, for what must stay on the device."""
        if request.label != "free":
            raise PolicyDenied(f"labelled {request.label}: must not leave the device", param="label", source="edge")
        _refuse_if_switched_off()
        if self._closed:
            raise Unreachable("the connection to the cloud is closed", source="edge")
        news = asyncio.Event()
        stream = self._session.open(request, self._clock(), news.set)
        self._wanted.set()
        self._ensure_keeper()
        try:
            delta = await self._first(stream, news)
            yield delta
            while delta.finish_reason is None:
                delta = await self._next(stream, news)
                yield delta
        finally:
            self._session.cancel(stream, self._clock())

    async def aclose(self) -> None:
        """Cancel what runs, tell the cloud if it listens, and close."""
        self._closed = True
        self._session.abandon(self._clock())
        if self._keeper is not None:
            self._wanted.set()
            self._wake()
            await asyncio.wait({self._keeper}, timeout=2 * CLOSE_S)
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()

    # --- one request ---

    async def _first(self, stream: Stream, news: asyncio.Event) -> Delta:
        try:
            async with asyncio.timeout(self._first_token_timeout):
                return await self._next(stream, news)
        except TimeoutError:
            raise DeadlineExceeded("the cloud's first token did not come in time", source="cloud") from None

    async def _next(self, stream: Stream, news: asyncio.Event) -> Delta:
        while True:
            news.clear()
            delta = self._session.take(stream, self._clock())
            if delta is not None:
                return delta
            await news.wait()

    # --- the connection ---

    def _wake(self) -> None:
        """The session may have something to send, or to wait for."""
        self._ready.set()
        self._arm()

    def _ensure_keeper(self) -> None:
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        """Have a connection whenever there is a use for one."""
        failures = 0
        while not self._closed:
            if not self._keep_connected and not self._session.wants_connection:
                self._wanted.clear()
                await self._wanted.wait()
                continue
            self._wanted.clear()
            self._losses.trying(self._clock())
            failures = 0 if await self._connect_and_pump() else failures + 1
            if failures and not self._closed:
                await self._back_off(failures)

    async def _connect_and_pump(self) -> bool:
        """Whether a connection came about and was of use: one that breaks at once must not be retried at once."""
        try:
            websocket = await self._connect()
        except (OSError, TimeoutError, WebSocketException, EOFError, PolicyDenied) as error:
            self._session.refused(_refusal(error))
            return False
        self._socket = websocket.transport.get_extra_info("socket")
        self._session.connected(Codec.client(str(websocket.subprotocol)), self._clock())
        began = self._clock()
        try:
            return await self._pump(websocket) and self._clock() - began > SHORT_LIFE_S
        finally:
            self._look(again_after=0.0)
            meant = self._closed or self._session.draining or switched_off(os.environ)
            self._losses.ended(self._clock(), cut=not meant)
            self._socket = None
            self._session.lost(self._clock())
            websocket.transport.abort()
            self._arm()

    async def _connect(self) -> ClientConnection:
        _refuse_if_switched_off()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else None
        websocket = await _Connect(
            self._url,
            subprotocols=self._subprotocols,
            additional_headers=headers,
            compression=None,
            open_timeout=self._connect_timeout,
            close_timeout=CLOSE_S,
            ping_interval=None,  # the wire has its own, which proves more
            max_size=MAX_FRAME,
            proxy=None,
            logger=self._logger,
            ssl=self._tls,
        )
        if websocket.subprotocol is None:
            websocket.transport.abort()
            raise InvalidHandshake("no common subprotocol")
        return websocket

    async def _pump(self, websocket: ClientConnection) -> bool:
        tasks = {asyncio.create_task(self._read(websocket)), asyncio.create_task(self._write(websocket))}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return self._session.up
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, websocket: ClientConnection) -> None:
        try:
            async for message in websocket:
                self._session.receive(message, self._clock())
                if self._session.up:
                    self._losses.working(self._clock())
                self._ready.set()
                self._arm()
        except ConnectionClosed:
            return

    async def _write(self, websocket: ClientConnection) -> None:
        try:
            while self._session.closing is None and not self._closed:
                self._ready.clear()
                await self._send_all(websocket)
                self._arm()
                await self._ready.wait()
            await self._send_all(websocket)
            await websocket.close(*(self._session.closing or (1000, "")))
        except ConnectionClosed:
            return

    async def _send_all(self, websocket: ClientConnection) -> None:
        while not switched_off(os.environ):
            message = self._session.next_message(self._clock())
            if message is None:
                return
            await websocket.send(message)
        websocket.transport.abort()

    async def _back_off(self, failures: int) -> None:
        """Full jitter; a new request is a reason not to wait on."""
        limit = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** min(failures, 16))
        self._wanted.clear()
        try:
            async with asyncio.timeout(self._jitter() * limit):
                await self._wanted.wait()
        except TimeoutError:
            return

    def _look(self, again_after: float = LOOK_S) -> None:
        """At what the kernel has counted of the present connection."""
        now = self._clock()
        if self._socket is not None and now - self._looked_at >= again_after:
            self._looked_at = now
            self._losses.seen(segments(self._socket), now)

    # --- time ---

    def _arm(self) -> None:
        at = self._session.next_deadline()
        if at is None or (self._timer is not None and at >= self._timer_at):
            return
        if self._timer is not None:
            self._timer.cancel()
        delay = max(0.0, at - self._clock())
        self._timer, self._timer_at = asyncio.get_running_loop().call_later(delay, self._on_time), at

    def _on_time(self) -> None:
        self._timer = None
        self._session.tick(self._clock())
        self._look()
        self._ready.set()
        if self._session.closing is None:
            self._arm()


class _Connect(connect):
    """A redirect is an error: the key is for the host that was configured, and for no other."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


def switched_off(env: Mapping[str, str]) -> bool:
    """Whether the environment forbids the cloud. Anything but a plain no counts as yes."""
    return env.get(NO_CLOUD, "").strip().lower() not in {"", "0", "f", "false", "n", "no", "off"}


def _refuse_if_switched_off() -> None:
    if switched_off(os.environ):
        raise PolicyDenied(f"{NO_CLOUD} is set: the cloud is switched off on this device", source="edge")


def _checked(url: str, allow_plaintext: bool) -> str:
    """The endpoint's URL. Raises BadRequest naming `cloud`."""
    parts = urlsplit(url)
    if parts.scheme not in {"ws", "wss"} or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise BadRequest("the cloud's address must look like wss://host:port", param="cloud")
    if parts.scheme == "ws" and not is_loopback(parts.hostname) and not allow_plaintext:
        raise BadRequest("ws:// is for loopback only: a key must not travel in the clear", param="cloud")
    return url if parts.path not in {"", "/"} else f"{parts.scheme}://{parts.netloc}{WIRE_PATH}"


def _refusal(error: Exception) -> CausewayError:
    """Why there is no connection. The texts hold no address and no key."""
    if isinstance(error, CausewayError):
        return error
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        refusal = _REFUSALS.get(status, Unreachable)
        return refusal(f"the cloud refused the connection with status {status}", source="cloud")
    why = "did not answer in time" if isinstance(error, TimeoutError) else "cannot be reached"
    if isinstance(error, ssl.SSLCertVerificationError):
        why = "has a certificate that is not trusted"
    return Unreachable(f"the cloud {why}", source="edge")


def _quiet_logger() -> logging.Logger:
    """Never at debug level: there the library writes out headers, and with them the key."""
    logger = logging.getLogger("causeway.websocket")
    logger.setLevel(logging.WARNING)
    return logger
