"""One accepted WebSocket: a reader that waits for nothing but the socket, and the only writer."""

import asyncio
from collections.abc import Callable

from starlette.websockets import WebSocket, WebSocketDisconnect

from shared.session import Event, ServerSession

FORCE_CLOSE_S = 1.0
"""How long a closing connection may take to send its last words."""


class SocketConnection:
    """Moves messages between a WebSocket and its `session`, which is set before `run`.

    `on_event` is told what to run or stop, `on_change` that anything may have changed.
    """

    session: ServerSession

    def __init__(
        self,
        websocket: WebSocket,
        on_event: Callable[[Event], None],
        on_change: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writer: asyncio.Task[None] | None = None
        self._websocket = websocket
        self._on_event = on_event
        self._on_change = on_change
        self._clock = clock
        self._ready = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def wake(self) -> None:
        """There may be something to send."""
        self._ready.set()

    async def run(self) -> None:
        """Until the peer leaves or the session wants to close. The application's return then closes the socket."""
        self._arm()
        self._writer = asyncio.create_task(self._write())
        tasks = {asyncio.create_task(self._read()), self._writer}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not self.ended.done():
                self.ended.set_result(None)

    async def _read(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes")
            for event in self.session.receive(message["text"] if data is None else data, self._clock()):
                self._on_event(event)
            self._moved()

    async def _write(self) -> None:
        try:
            while self.session.closing is None:
                self._ready.clear()
                await self._send_all()
                if self.session.closing is None:
                    self._arm()
                    await self._ready.wait()
            await self._send_all()
            await self._websocket.close(*self.session.closing)
        except (WebSocketDisconnect, RuntimeError):
            return

    async def _send_all(self) -> None:
        while (message := self.session.next_message(self._clock())) is not None:
            if isinstance(message, bytes):
                await self._websocket.send_bytes(message)
            else:
                await self._websocket.send_text(message)

    def _arm(self) -> None:
        at = self.session.next_deadline()
        if self._timer is None or at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            delay = max(0.0, at - self._clock())
            self._timer, self._timer_at = asyncio.get_running_loop().call_later(delay, self._on_time), at

    def _on_time(self) -> None:
        self._timer = None
        self.session.tick(self._clock())
        self._moved()

    def _moved(self) -> None:
        """The session may have something to send, to wait for, or a reason to close."""
        self.wake()
        self._on_change()
        if self.session.closing is None:
            self._arm()
        else:
            self._closing()

    def _closing(self) -> None:
        """A peer that does not read must not keep the writer, and with it the connection, for ever."""
        if self._timer is not None:
            self._timer.cancel()
        if self._writer is not None:
            self._timer = asyncio.get_running_loop().call_later(FORCE_CLOSE_S, self._writer.cancel)
