"""The daemon's handle on the process that runs the model: its start, its frames, its death."""

import asyncio
import signal
import subprocess
from collections.abc import Callable

from edge_agent.backends.pipe import Frame, FromModel, encode, from_model
from edge_agent.backends.spawn import Spare, end, spawn
from shared.errors import BadFrame, Overloaded

MAX_UNSENT = 128 << 20
"""Bytes that may wait for a process that does not read."""
REAP_S = 10.0
REASON_S = 0.5
"""How long to wait for the status of a process whose pipe has ended: those it answered are waiting, too."""


class Child(asyncio.Protocol):
    """One process. `received` gets its frames; `died` is called once, when it is no more, with the reason."""

    def __init__(self, received: Callable[[FromModel], None], died: Callable[[str], None]) -> None:
        self._received, self._died = received, died
        self._frames = from_model()
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._why: str | None = None
        self._reaped = asyncio.get_running_loop().create_future()
        self._reaping: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, received: Callable[[FromModel], None], died: Callable[[str], None], spare: Spare | None = None
    ) -> "Child":
        """Takes the `spare` if it can still be had. See `spawn.spawn` for the thread, and the OSError."""
        child = cls(received, died)
        process, ours = (spare.take() if spare else None) or spawn()
        child._process = process
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: child, sock=ours)
        except BaseException:
            end(process, ours)
            raise
        return child

    @property
    def pid(self) -> int:
        return -1 if self._process is None else self._process.pid

    def send(self, frame: Frame) -> None:
        """Raises BadFrame, Overloaded. What is sent to a process that died is lost, as is everything in it."""
        data, transport = encode(frame), self._transport
        if transport is None or transport.is_closing():
            return
        if transport.get_write_buffer_size() + len(data) > MAX_UNSENT:
            raise Overloaded("the local model takes nothing in", source="edge", retry_after=1.0)
        transport.write(data)

    def kill(self, why: str) -> None:
        """`died` follows soon, with this reason."""
        self._why = self._why or why
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    async def gone(self, limit: float) -> None:
        """Wait for its death and for `died`; hasten it after `limit` seconds."""
        process = self._process
        if process is not None:
            try:
                await asyncio.to_thread(process.wait, limit)
            except subprocess.TimeoutExpired:
                self.kill("would not end")
                await asyncio.to_thread(process.wait, REAP_S)
        # Its pipe has ended, but the loop may not have heard of it yet.
        await self._reaped

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # of a stream socket

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                self._received(frame)
        except BadFrame as error:
            self.kill(f"sent what is no frame ({error})")
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  asyncio's signature
        self._transport = None
        self._reaping = asyncio.get_running_loop().create_task(self._reap())
        self._reaping.add_done_callback(lambda _: self._reaped.set_result(None))

    async def _reap(self) -> None:
        process, why = self._process, self._why
        if process is None:
            return
        if why is not None:
            process.kill()
        try:
            status = await asyncio.to_thread(process.wait, REASON_S)
        except subprocess.TimeoutExpired:
            process.kill()
            self._died(why or "closed its pipe")
        else:
            self._died(why or _said(status))


def _said(status: int) -> str:
    if status < 0:
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"was ended by signal {-status}"
    return f"ended with status {status}"
