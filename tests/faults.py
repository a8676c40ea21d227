"""A TCP proxy that misbehaves on request, and says what it did: a test must prove that its fault happened."""

import asyncio
import ctypes
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SO_ATTACH_FILTER, SO_MEMINFO, SK_MEMINFO_DROPS = 26, 55, 8
SKF_AD_OFF, SKF_AD_RANDOM = 0xFFFFF000, 56
"""Linux's numbers, which Python's `socket` does not name."""


class Proxy:
    """Passes bytes between its port and `target`. Its toxics may be changed at any time.

    `cut_after` bytes from the server (and then after each of `cut_again` more), or a call of `cut`, close both ends
    (`reset`: with RST); `black_hole` swallows
    everything and closes nothing; `delay` seconds hold back each chunk; `slice_to` bytes is the largest chunk that is
    passed on; `refuse` accepts and closes at once; `lose` makes the kernel drop that share of the segments that either
    side sends from now on (Linux). `happened` counts what was done, and `lost` what the kernel dropped.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.cut_after: int | None = None
        self.cut_again: list[int] = []
        self.reset = False
        self.black_hole = False
        self.refuse = False
        self.delay = 0.0
        self.slice_to = 65536
        self.happened: Counter[str] = Counter()
        self.up = bytearray()
        """Everything that a client sent."""
        self.connections: list[bytearray] = []
        """The same, one by one."""
        self.down_bytes = 0
        self._lose: float | None = None
        self._pairs: dict[asyncio.StreamWriter, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        """Break every connection now."""
        for pair in list(self._pairs.items()):
            self.happened["cut"] += 1
            for writer in pair:
                self._close(writer)

    def lose(self, share: float) -> None:
        """By a filter on our sockets: what it drops was never received, so its sender has to send it again."""
        self._lose = share
        for pair in self._pairs.items():
            _drop(pair, share)

    @property
    def lost(self) -> int:
        """Of the connections that are open now."""
        return sum(_dropped(writer) for pair in self._pairs.items() for writer in pair)

    async def aclose(self) -> None:
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.happened["connected"] += 1
        if self.refuse:
            self.happened["refused"] += 1
            self._close(writer)
            return
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            self.happened["unreachable"] += 1
            self._close(writer)
            return
        self._pairs[writer] = to_server
        if self._lose is not None:
            _drop((writer, to_server), self._lose)
        self.connections.append(sent := bytearray())
        try:
            await asyncio.gather(self._pass(reader, to_server, sent), self._pass(from_server, writer, None))
        finally:
            self._pairs.pop(writer, None)
            self._close(writer)
            self._close(to_server)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytearray | None) -> None:
        """`sent` keeps what a client sends; None on the way down."""
        up = sent is not None
        try:
            while chunk := await reader.read(self.slice_to):
                if sent is not None:
                    self.up += chunk
                    sent += chunk
                if self.black_hole:
                    self.happened["swallowed"] += 1
                    continue
                if self.delay:
                    self.happened["delayed"] += 1
                    await asyncio.sleep(self.delay)
                if not up and self.cut_after is not None and self.down_bytes + len(chunk) > self.cut_after:
                    writer.write(chunk[: max(0, self.cut_after - self.down_bytes)])
                    self.cut_after = self.down_bytes + self.cut_again.pop(0) if self.cut_again else None
                    self.cut()
                    return
                self.down_bytes += 0 if up else len(chunk)
                self.happened["chunks"] += 1
                writer.write(chunk)
                await writer.drain()
        except OSError:
            pass
        self._close(writer)

    def _close(self, writer: asyncio.StreamWriter) -> None:
        if self.reset and not writer.is_closing():
            self.happened["reset"] += 1
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        writer.close()


def _drop(writers: tuple[asyncio.StreamWriter, ...], share: float) -> None:
    """Attach a classic BPF program: load a random number, keep the packet if it is larger than the share's."""
    instructions = (
        (0x20, 0, 0, SKF_AD_OFF + SKF_AD_RANDOM),  # A = random
        (0x25, 0, 1, int(share * 0xFFFFFFFF)),  # if A > share: next, else: over next
        (0x06, 0, 0, 0xFFFFFFFF),  # keep it all
        (0x06, 0, 0, 0),  # drop it
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
    attached = struct.pack("HP", len(instructions), ctypes.addressof(program))
    for writer in writers:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, attached)


def _dropped(writer: asyncio.StreamWriter) -> int:
    memory = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)
    return int(struct.unpack("=9I", memory)[SK_MEMINFO_DROPS])


def payloads(sent: bytes | bytearray) -> bytes:
    """What a client said over one WebSocket: its handshake and its frames' payloads, unmasked (RFC 6455, section 5.2),
    the last one as far as it came."""
    handshake, _, data = bytes(sent).partition(b"\r\n\r\n")
    said, at = [handshake], 0
    while at + 6 <= len(data):
        size, at = data[at + 1] & 0x7F, at + 2
        if size >= 126:
            width = 2 if size == 126 else 8
            size, at = int.from_bytes(data[at : at + width]), at + width
        mask, payload, at = data[at : at + 4], data[at + 4 : at + 4 + size], at + 4 + size
        said.append(bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)))
    return b"".join(said)


@asynccontextmanager
async def faulty(target: int) -> AsyncIterator[Proxy]:
    """A proxy in front of a loopback port."""
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.aclose()
        await server.wait_closed()
