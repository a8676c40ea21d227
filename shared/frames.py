"""The frames of the wire, as typed structs, and the codec between them and bytes.

One definition serves both subprotocols: `causeway.v1.msgpack` (binary WebSocket messages) and `causeway.v1.json` (text
messages). A frame is an array whose first element is its name, so that a token costs tens of bytes; byte strings are
base64 in JSON. Unknown frames, unknown fields, wrong types and sizes out of bounds are refused, never skipped.
The rules that connect the frames are in `shared/session.py`; PROTOCOL.md explains both.
"""

import hashlib
import re
from typing import Annotated, Final, Literal, Self

import msgspec

from shared.errors import BadFrame, BadRequest, CausewayError, Source, TooLarge, UnsupportedVersion
from shared.schemas import ChatRequest, FinishReason, ModelCard, Route, TokenLogprob, ToolPiece, Usage

PROTOCOL_VERSION: Final = 1
WIRE_PATH: Final = "/v1/connect"
MSGPACK: Final = "causeway.v1.msgpack"
JSON: Final = "causeway.v1.json"
SUBPROTOCOLS: Final = (MSGPACK, JSON)
"""In order of preference."""

MAX_FRAME: Final = 64 << 10
BODY_PIECE: Final = 16 << 10
MAX_OFFER: Final = 272 << 10
"""Of a signed policy, as `shared.fleet` makes them."""
MAX_MESSAGE_CHARS: Final = 1024

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)]
Sid = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
"""A stream: one request on one connection. Chosen by the client, rising; means nothing on another connection."""
Seq = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
Name = Annotated[str, msgspec.Meta(max_length=128)]
Token = Annotated[str, msgspec.Meta(min_length=16, max_length=128, pattern="^[A-Za-z0-9_-]+$")]
Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Piece = Annotated[bytes, msgspec.Meta(min_length=1, max_length=BODY_PIECE)]
OfferPiece = Annotated[bytes, msgspec.Meta(max_length=BODY_PIECE)]
Window = Annotated[int, msgspec.Meta(ge=0, le=4096)]
"""Credit, in DATA frames."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server permits on one connection; told in WELCOME so that nobody finds out by failing. Bytes, seconds."""

    max_frame: Annotated[int, msgspec.Meta(ge=MAX_FRAME // 2, le=1 << 24)] = MAX_FRAME
    max_prompt: Count = 1 << 20
    """Of the encoded request."""
    max_output: Count = 1 << 20
    """Of one answer's UTF-8 text."""
    max_streams: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 32
    resume_ttl: Seconds = 120.0


class _Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=str.lower):
    """Base of all frames."""


class FleetState(msgspec.Struct, frozen=True, array_like=True):
    """What an edge that follows a fleet says of its policies. Versions are the fleet's; 0 is none."""

    edge: Name
    """The device, by a name that it keeps."""
    group: Name = ""
    seen: Count = 0
    """The highest version it ever took: none up to this one is taken again."""
    using: Count = 0
    """The one in force. Not `seen` where the device's own administrator, or its guard, put another in its place."""
    refused: Count = 0
    """The one that it was offered and will not have."""
    digest: Name = ""
    """SHA-256 of the signed bytes of `seen`, in hex: two policies of one version are not one policy."""
    code: Name = ""
    """Why `using` is not the newest version that it was offered; empty if it is."""
    message: Annotated[str, msgspec.Meta(max_length=MAX_MESSAGE_CHARS)] = ""


class Hello(_Frame, frozen=True, forbid_unknown_fields=False):
    """First frame of a client. Later versions may add fields, so that they can still be told which version we speak."""

    vmin: Count
    vmax: Count
    client: Name = ""
    fleet: FleetState | None = None
    """Asks for the fleet's policies. A server that has none of them, or never heard of them, says nothing of it."""


class _Greeting(_Frame, frozen=True, forbid_unknown_fields=False, tag="hello"):
    """What a HELLO of any version begins with."""

    vmin: Count
    vmax: Count


class Welcome(_Frame, frozen=True):
    version: Count
    epoch: Name
    """Names this life of the server; another epoch means that every log of the old one is gone."""
    limits: Limits
    models: tuple[ModelCard, ...] = ()


class Open(_Frame, frozen=True):
    """A new request. `rid` is the idempotency key: the same tenant, rid and hash attach to the same execution."""

    sid: Sid
    rid: Name
    sha256: Hash
    length: Count
    window: Window


class Body(_Frame, frozen=True):
    sid: Sid
    off: Count
    data: Piece


class Accept(_Frame, frozen=True):
    """The request runs. `token` is what a later RESUME must show; `attach` numbers this attachment."""

    sid: Sid
    attach: Count
    token: Token


class Data(_Frame, frozen=True):
    """A piece of output. `off` is where it starts in the whole output, in bytes as `output_bytes` makes them."""

    sid: Sid
    seq: Seq
    off: Count
    text: str
    tokens: Count
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolPiece, ...] = ()


class Ack(_Frame, frozen=True):
    """Everything up to `seq` arrived (0: nothing yet); `window` frames beyond it may be sent."""

    sid: Sid
    attach: Count
    seq: Count
    window: Window


class Cancel(_Frame, frozen=True):
    sid: Sid


class End(_Frame, frozen=True):
    """The answer is complete. Numbered and acknowledged like DATA; `total_bytes` and `sha256` are of all output,
    as `output_bytes` makes it."""

    sid: Sid
    seq: Seq
    finish_reason: FinishReason
    usage: Usage | None
    total_bytes: Count
    sha256: Hash
    route: Route | None = None
    stop: str | None = None


class Err(_Frame, frozen=True):
    """A failure of one stream or (`sid` 0) of the connection, which is then closed.

    `seq` 0: the frame that named this stream was refused, or the stream was detached. Otherwise this is the numbered
    end of an accepted request, kept and acknowledged like END.
    """

    sid: Count
    seq: Count
    code: Name
    message: Annotated[str, msgspec.Meta(max_length=MAX_MESSAGE_CHARS)]
    param: Name | None = None
    source: Source | None = None
    retry_after: Seconds | None = None
    scope: Literal["stream", "connection"] = "stream"

    @classmethod
    def of(cls, error: CausewayError, sid: int, seq: int = 0) -> Self:
        return cls(
            sid=sid,
            seq=seq,
            code=error.code,
            message=error.message[:MAX_MESSAGE_CHARS],
            param=None if error.param is None else error.param[:128],
            source=error.source or "cloud",
            retry_after=error.retry_after,
            scope="stream" if sid else "connection",
        )


class Resume(_Frame, frozen=True):
    """Go on with an accepted request on this connection, after `last_seq`."""

    sid: Sid
    rid: Name
    epoch: Name
    token: Token
    last_seq: Count
    window: Window


class Resumed(_Frame, frozen=True):
    sid: Sid
    attach: Count
    from_seq: Seq
    token: Token


class Fleet(_Frame, frozen=True):
    """The edge's state has changed. Only to a server that has sent an OFFER."""

    state: FleetState


class Offer(_Frame, frozen=True):
    """A piece of a signed policy of `length` bytes, for an edge that asked in HELLO. Version 0, empty: nothing new."""

    version: Count
    length: Count
    off: Count
    data: OfferPiece


class Ping(_Frame, frozen=True):
    id: Count


class Pong(_Frame, frozen=True):
    id: Count


class Goaway(_Frame, frozen=True):
    """The server takes no new request; running ones have `drain` seconds. Come back after `reconnect_after`."""

    reason: Name
    drain: Seconds
    reconnect_after: Seconds


ClientFrame = Hello | Open | Body | Ack | Cancel | Resume | Fleet | Ping | Pong
ServerFrame = Welcome | Accept | Data | End | Err | Resumed | Offer | Ping | Pong | Goaway
Frame = ClientFrame | ServerFrame


class Codec:
    """Between frames and WebSocket messages, for one subprotocol and one side. Stateless.

    `decode` raises BadFrame, TooLarge or UnsupportedVersion; none of their messages quotes the peer's bytes.
    """

    def __init__(self, subprotocol: str, receives: object, max_frame: int = MAX_FRAME) -> None:
        if subprotocol not in SUBPROTOCOLS:
            raise BadRequest("unknown subprotocol", param="subprotocol")
        self.binary = subprotocol == MSGPACK
        self.max_frame = max_frame
        self._packed = msgspec.msgpack.Decoder[Frame](receives)
        self._json = msgspec.json.Decoder[Frame](receives)

    @classmethod
    def server(cls, subprotocol: str, max_frame: int = MAX_FRAME) -> "Codec":
        return cls(subprotocol, ClientFrame, max_frame)

    @classmethod
    def client(cls, subprotocol: str, max_frame: int = MAX_FRAME) -> "Codec":
        return cls(subprotocol, ServerFrame, max_frame)

    def encode(self, frame: Frame) -> bytes | str:
        """Raises TooLarge rather than send what the peer would refuse."""
        data = _PACK.encode(frame) if self.binary else _DUMP.encode(frame)
        if len(data) > self.max_frame:
            raise TooLarge(f"frame over {self.max_frame} bytes", param="frame")
        return data if self.binary else data.decode()

    def decode(self, message: bytes | str) -> Frame:
        if isinstance(message, bytes) is not self.binary:
            raise BadFrame(f"this subprotocol takes {'binary' if self.binary else 'text'} messages", param="frame")
        data = message if isinstance(message, bytes) else message.encode("utf-8", "surrogatepass")
        if len(data) > self.max_frame:
            raise TooLarge(f"frame over {self.max_frame} bytes", param="frame")
        try:
            frame: Frame = self._packed.decode(data) if self.binary else self._json.decode(data)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            if self._is_of_another_version(data):
                raise UnsupportedVersion(f"only version {PROTOCOL_VERSION} is spoken here", param="version") from None
            raise BadFrame("malformed frame", param=_path(error) or "frame") from None
        if isinstance(frame, Hello) and not frame.vmin <= PROTOCOL_VERSION <= frame.vmax:
            raise UnsupportedVersion(f"only version {PROTOCOL_VERSION} is spoken here", param="version")
        return frame

    def _is_of_another_version(self, data: bytes) -> bool:
        """A HELLO that does not fit ours, because what follows its versions means something else in its own."""
        try:
            greeting = (_PACKED_GREETING if self.binary else _JSON_GREETING).decode(data)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return False
        return not greeting.vmin <= PROTOCOL_VERSION <= greeting.vmax


def output_bytes(text: str, tool_calls: tuple[ToolPiece, ...]) -> bytes:
    """What a piece of output counts as: its text in UTF-8, then the pieces of its calls in msgpack, if any."""
    return text.encode() + (_PACK.encode(tool_calls) if tool_calls else b"")


_PACK = msgspec.msgpack.Encoder()
_DUMP = msgspec.json.Encoder()
_PACKED_GREETING = msgspec.msgpack.Decoder(_Greeting)
_JSON_GREETING = msgspec.json.Decoder(_Greeting)
_REQUEST = msgspec.msgpack.Decoder(ChatRequest)
_AT = re.compile(r" - at `\$?\.?([^`]*)`")


def encode_request(request: ChatRequest) -> bytes:
    """The bytes that OPEN announces and BODY carries: msgpack, whichever the subprotocol. Raises BadRequest."""
    try:
        return _PACK.encode(request)
    except (UnicodeError, OverflowError):
        raise BadRequest("the request holds text that is not valid Unicode", param="messages") from None


def decode_request(body: bytes) -> ChatRequest:
    """Raises BadRequest naming the field."""
    try:
        return _REQUEST.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadRequest("the request does not fit the schema", param=_path(error) or "body") from None


def body_hash(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def _path(error: Exception) -> str | None:
    """Which field a decoder complained about: the path alone, since the rest of its text may quote input."""
    found = _AT.search(str(error))
    return found.group(1)[:128] if found else None
