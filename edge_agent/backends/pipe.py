"""What crosses the pipe between the daemon and the process that runs the model: typed frames in msgpack, each after its
length. Both ends refuse whatever else arrives.

A request is known by a number of the daemon's own: ids are the clients' and may repeat.
"""

import struct
from collections.abc import Iterator
from typing import Generic, Literal, TypeVar

import msgspec

from shared.errors import BadFrame, CausewayError, Source, from_code
from shared.gguf import ModelInvalid
from shared.schemas import ChatRequest, Delta

MAX_FRAME = 64 << 20
"""Bytes: several times what the largest request of an HTTP surface can become."""
_LENGTH = struct.Struct("<I")


class Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of all frames."""


class Fault(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A CausewayError on its way."""

    code: str
    message: str
    param: str | None = None
    source: Source | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, error: CausewayError) -> "Fault":
        return cls(error.code, error.message, error.param, error.source, error.retry_after)

    def error(self) -> CausewayError:
        if self.code == ModelInvalid.code:
            return ModelInvalid(self.message, param=self.param, source=self.source)
        return from_code(
            self.code, self.message, param=self.param, source=self.source or "edge", retry_after=self.retry_after
        )


# --- to the model's process ---


class Load(Frame, frozen=True):
    """The first frame, and only the first. `context` is of one request, in tokens."""

    path: str
    name: str
    slots: int
    context: int | None = None
    threads: int | None = None
    prefix_bytes: int = 0
    """Of memory, for what left its slot."""
    saved: str | None = None
    """The folder where prefixes lie between two lives; `saved_bytes` is its limit."""
    saved_bytes: int = 0
    context_shift: bool = False


class Ask(Frame, frozen=True):
    number: int
    request: ChatRequest


class Count(Frame, frozen=True):
    number: int
    request: ChatRequest


class Cancel(Frame, frozen=True):
    number: int


class Ping(Frame, frozen=True):
    pass


class Stop(Frame, frozen=True):
    """End, in good order."""


ToModel = Load | Ask | Count | Cancel | Ping | Stop


# --- from it ---


class Ready(Frame, frozen=True):
    context_length: int


class Broken(Frame, frozen=True):
    """The model could not be loaded."""

    fault: Fault


class Log(Frame, frozen=True):
    level: Literal["debug", "warning", "error"]
    text: str


class Held(Frame, frozen=True):
    """Sent before native code or the model's own template touches this request, and after it let go: who is held when
    the process dies may be why."""

    number: int
    held: bool


class Counted(Frame, frozen=True):
    number: int
    tokens: int


class Step(Frame, frozen=True):
    """What one step led to, for all requests together; tokens/s as they were measured so far."""

    deltas: tuple[tuple[int, Delta], ...] = ()
    faults: tuple[tuple[int, Fault], ...] = ()
    tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None


class Pong(Frame, frozen=True):
    """`busy_s`: for how long the slowest piece of work has been under way, a step or a prompt."""

    busy_s: float


FromModel = Ready | Broken | Log | Held | Counted | Step | Pong

T = TypeVar("T")


def encode(frame: Frame) -> bytes:
    """Raises BadFrame if it is too long, or a text is none."""
    try:
        body = msgspec.msgpack.encode(frame)
    except UnicodeEncodeError as error:
        raise BadFrame("a text holds half a character") from error
    if len(body) > MAX_FRAME:
        raise BadFrame(f"a frame of {len(body)} bytes; at most {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class Frames(Generic[T]):
    """Bytes in, frames out; those that a `decoder` knows."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[T]") -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Raises BadFrame; then the pipe is of no more use."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise BadFrame(f"a frame of {length} bytes; at most {MAX_FRAME}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield self._decode(body)

    def _decode(self, body: bytes) -> T:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, CausewayError, RecursionError) as error:
            # Its text may quote what was sent.
            raise BadFrame(f"not a frame: {type(error).__name__}") from None


def to_model() -> Frames[ToModel]:
    return Frames(msgspec.msgpack.Decoder(ToModel))


def from_model() -> Frames[FromModel]:
    return Frames(msgspec.msgpack.Decoder(FromModel))
