"""The WebSocket endpoint: a thin shell around `shared.session`.

Each accepted request runs in a task of its own that feeds its `Execution`; the task knows no connection, so that a
client may lose its connection and come back. Every rule of the wire is in `shared/session.py`.
"""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

import structlog
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from cloud_engine.gateway.connection import SocketConnection
from cloud_engine.gateway.fleet import Fleet
from shared.connection import GOING_AWAY
from shared.errors import BadRequest, CausewayError, Forbidden, Internal, Overloaded, RateLimited
from shared.executions import Execution, Rules
from shared.frames import SUBPROTOCOLS, WIRE_PATH, Codec
from shared.guard import refuse_websocket, typed
from shared.schemas import Answer, ChatRequest, Delta
from shared.session import Event, Registry, Reported, ServerSession, Start
from shared.telemetry import Listener, observed

CLOSE_S = 2.0


class SocketEndpoint:
    """Serves `WIRE_PATH`: `app.router.routes.append(endpoint.route())`.

    `authenticate` maps the upgrade's headers (lower-case names) to a tenant or raises Unauthorized or Forbidden;
    `answer_for` gives the tenant's Answer. Executions of clients that never return are cancelled after the grace time
    and reported to `listeners` like every other.
    """

    def __init__(
        self,
        *,
        answer_for: Callable[[str], Answer],
        authenticate: Callable[[Mapping[str, str]], str],
        rules: Rules | None = None,
        origins: frozenset[str] = frozenset(),
        listeners: tuple[Listener, ...] = (),
        fleet: Fleet | None = None,
        max_connections: int = 64,
        new_token: Callable[[], str] = lambda: secrets.token_urlsafe(16),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_connections` is per tenant."""
        self._answer_for = answer_for
        self._authenticate = authenticate
        self._rules = rules or Rules()
        self._origins = origins
        self._listeners = listeners
        self._fleet = fleet
        self._max_connections = max_connections
        self._clock = clock
        self._registry = Registry(new_token(), self._rules, new_token)
        self._connections: set[SocketConnection] = set()
        self._per_tenant: Counter[str] = Counter()
        self._runs: dict[Execution, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._quiet = asyncio.Event()
        self._log = structlog.get_logger("causeway.wire")

    def route(self) -> WebSocketRoute:
        return WebSocketRoute(WIRE_PATH, self.__call__)

    @property
    def running(self) -> int:
        return len(self._runs)

    @property
    def held(self) -> int:
        """Executions whose output is kept: running, or not yet acknowledged."""
        return len(self._registry)

    @property
    def connected(self) -> int:
        return len(self._connections)

    async def __call__(self, websocket: WebSocket) -> None:
        try:
            tenant, subprotocol = self._admit(websocket)
        except CausewayError as error:
            await websocket.receive()
            await refuse_websocket(websocket.scope, websocket.send, error.at("cloud"))
            return
        self._per_tenant[tenant] += 1
        connection = SocketConnection(websocket, self._on_event, self._on_change, self._clock)
        codec = Codec.server(subprotocol, self._rules.limits.max_frame)
        connection.session = ServerSession(self._registry, tenant, codec, self._clock(), connection.wake)
        self._connections.add(connection)
        try:
            await websocket.accept(subprotocol)
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._per_tenant[tenant] -= 1
            connection.session.lost(self._clock())
            if self._fleet is not None:
                self._fleet.gone(connection.session)
            self._on_change()

    async def drain(self, within: float) -> None:
        """Take nothing new, let what runs end and be read for at most `within` seconds, then close."""
        self._registry.draining = True
        for connection in self._connections:
            connection.session.goaway("draining", within, 1.0, self._clock())
            connection.wake()
        self._on_change()
        try:
            async with asyncio.timeout(within):
                await self._quiet.wait()
        except TimeoutError:
            self._log.warning("drain_timeout", running=len(self._runs))
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """End what runs, tell its clients, close every connection."""
        self._registry.draining = True
        for execution, task in self._runs.items():
            execution.fail(Overloaded("the server is stopping", source="cloud"), self._clock())
            task.cancel()
        await asyncio.gather(*self._runs.values(), return_exceptions=True)
        closing = list(self._connections)
        for connection in closing:
            connection.session.close(GOING_AWAY)
            connection.wake()
        if closing:
            await asyncio.wait({connection.ended for connection in closing}, timeout=CLOSE_S)
        if self._timer is not None:
            self._timer.cancel()

    def _admit(self, websocket: WebSocket) -> tuple[str, str]:
        """The tenant and the subprotocol, before the upgrade is accepted. Raises what the peer is told instead."""
        origin = websocket.headers.get("origin")
        if origin is not None and origin not in self._origins:
            raise Forbidden("this Origin is not allowed", param="origin")
        tenant = self._authenticate(websocket.headers)
        offered = websocket.scope.get("subprotocols", [])
        subprotocol = next((known for known in SUBPROTOCOLS if known in offered), None)
        if subprotocol is None:
            raise BadRequest(f"offer a subprotocol: {' or '.join(SUBPROTOCOLS)}", param="sec-websocket-protocol")
        if self._registry.draining:
            raise Overloaded("the server is draining", retry_after=1.0)
        if self._per_tenant[tenant] >= self._max_connections:
            raise RateLimited(f"at most {self._max_connections} connections at once", retry_after=1.0)
        return tenant, subprotocol

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Reported):
            if self._fleet is not None:
                self._fleet.reported(event)
        elif isinstance(event, Start):
            task = asyncio.create_task(self._run(event.execution, event.request))
            self._runs[event.execution] = task
            task.add_done_callback(lambda _: self._ended(event.execution))
        elif event.execution in self._runs:
            # Not before its first step: a run that never began would end without a word to the listeners.
            asyncio.get_running_loop().call_soon(self._runs[event.execution].cancel)

    async def _run(self, execution: Execution, request: ChatRequest) -> None:
        """Feed one execution from its Answer; whatever happens, it ends."""
        room = asyncio.Event()
        execution.on_room = room.set
        try:
            answer = self._answer_for(execution.tenant).answer(request)
            deltas = observed(answer, request, self._listeners, tenant=execution.tenant, clock=self._clock)
            await self._feed(execution, deltas, room)
        except asyncio.CancelledError:
            execution.fail(Overloaded("the server is stopping"), self._clock())
            raise
        except Exception as error:
            execution.fail(typed(error, "cloud"), self._clock())

    def _ended(self, execution: Execution) -> None:
        execution.fail(Internal("the answer had no end", source="cloud"), self._clock())
        execution.on_room = _nothing
        del self._runs[execution]
        self._on_change()

    async def _feed(self, execution: Execution, deltas: AsyncGenerator[Delta, None], room: asyncio.Event) -> None:
        async with aclosing(deltas):
            async for delta in deltas:
                execution.produce(delta, self._clock())
                while not execution.room and not execution.ended:
                    room.clear()
                    await room.wait()
                if execution.ended:
                    return

    def _on_change(self) -> None:
        """After anything that may have left an execution without a reader, or the endpoint without work."""
        if self._registry.changed:
            self._arm()
        if self._registry.draining and not self._runs and not any(one.session.busy for one in self._connections):
            self._quiet.set()

    def _arm(self) -> None:
        """Be called when the registry next has something to end or to forget."""
        at = self._registry.next_deadline()
        if self._timer is not None:
            self._timer.cancel()
        delay = None if at is None else max(0.0, at - self._clock())
        self._timer = None if delay is None else asyncio.get_running_loop().call_later(delay, self._on_time)

    def _on_time(self) -> None:
        for execution in self._registry.tick(self._clock()):
            self._log.warning("abandoned", id=execution.request_id, tenant=execution.tenant)
            if execution in self._runs:
                self._runs[execution].cancel()
        self._arm()


def _nothing() -> None:
    return None
