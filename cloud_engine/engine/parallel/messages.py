"""What rank 0 tells the other ranks, and what they say back: length, then msgpack, over a socket pair.

Nothing but plain data of known types is decoded; a message has a greatest size, which both ends keep.
"""

import socket
import struct
from typing import Any, Generic, Literal, TypeVar

import msgspec

from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig

MAX_MESSAGE = 64 << 20
"""Bytes. A step of 4096 sequences with tables of 2000 blocks each takes 40 MB."""
_LENGTH = struct.Struct(">I")

T = TypeVar("T")


class Load(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The first message: meet the others at the file `meeting`, and load this rank's part of the model at `path`."""

    rank: int
    path: str
    meeting: str
    threads: int
    config: EngineConfig


class Begin(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The second: make the KV tensors. Nothing is left to be chosen in this config but the scales of an FP8 cache, for
    which `text` is computed: each rank has its own."""

    config: EngineConfig
    text: list[int]


class Step(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """All others: compute this. `last` are the tokens that the step before sampled, if they are needed."""

    chunks: list[Chunk]
    last: list[int] = []


class Reached(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """`awake` when a rank runs, `loaded` after Load, `ready` after Begin. Steps are not answered: what the ranks
    compute together says enough. `room`: once loaded, the bytes that the rank's KV blocks may take."""

    point: Literal["awake", "loaded", "ready"]
    room: int = 0


class Failed(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A rank's last words."""

    message: str


ToRank = Load | Begin | Step
FromRank = Reached | Failed


class Channel(Generic[T]):
    """One end. `kind` is the type, or the union of types, that is received."""

    def __init__(self, end: socket.socket, kind: Any) -> None:
        self._socket = end
        self._decoder = msgspec.msgpack.Decoder(kind)

    def send(self, message: msgspec.Struct) -> None:
        """Raises ValueError for a message that is too large, OSError if the other end is gone."""
        data = msgspec.msgpack.encode(message)
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE}")
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> T:
        """Raises EOFError if the other end is closed, ValueError for what is no message of the kind."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > MAX_MESSAGE:
            raise ValueError(f"a message of {length} bytes is over the limit of {MAX_MESSAGE}")
        message: T = self._decoder.decode(self._exactly(length))
        return message

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError("the other end is closed")
            view = view[count:]
        return data
