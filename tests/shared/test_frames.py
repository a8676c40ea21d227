"""Frames survive both encodings; nothing that is not a frame gets in."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import frames
from shared.errors import BadFrame, BadRequest, TooLarge, UnsupportedVersion
from shared.frames import BODY_PIECE, MAX_FRAME, MSGPACK, SUBPROTOCOLS, Codec, Frame
from shared.schemas import (
    ChatRequest,
    Grammar,
    Message,
    ModelCard,
    Route,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolPiece,
    TopLogprob,
    Usage,
)

TOKEN = "t" * 22
DIGEST = bytes(range(32))
LOGPROBS = (TokenLogprob("é", -0.5, (195, 169), (TopLogprob("e", -1.5, (101,)),)),)

FROM_CLIENT: tuple[Frame, ...] = (
    frames.Hello(1, 1, "edge"),
    frames.Open(1, "rid", DIGEST, 10, 64),
    frames.Body(1, 0, bytes(range(256)) * 64),
    frames.Ack(1, 1, 7, 64),
    frames.Cancel(1),
    frames.Resume(2, "rid", "epoch", TOKEN, 7, 64),
    frames.Ping(1),
    frames.Pong(1),
)
FROM_SERVER: tuple[Frame, ...] = (
    frames.Welcome(1, "epoch", frames.Limits(), (ModelCard(id="m", context_length=8192),)),
    frames.Accept(1, 1, TOKEN),
    frames.Data(1, 1, 0, 'naïve "\x00\U0001f600"', 1, LOGPROBS),
    frames.Data(1, 2, 0, "", 0, (), (ToolPiece(0, "", "call_1", "f"), ToolPiece(0, '{"a": "é\x00'))),
    frames.End(
        1, 2, "stop", Usage(prompt_tokens=1, completion_tokens=2), 3, DIGEST, Route(target="cloud", reason="r"), "\n"
    ),
    frames.Err(1, 0, "overloaded", "busy", retry_after=1.5),
    frames.Resumed(2, 2, 8, TOKEN),
    frames.Ping(1),
    frames.Pong(1),
    frames.Goaway("draining", 20.0, 1.0),
)
BY_SUBPROTOCOL = pytest.mark.parametrize("subprotocol", SUBPROTOCOLS)


def pack(subprotocol: str, value: object) -> bytes | str:
    return msgspec.msgpack.encode(value) if subprotocol == MSGPACK else msgspec.json.encode(value).decode()


@BY_SUBPROTOCOL
@pytest.mark.parametrize("frame", [*FROM_CLIENT, *FROM_SERVER], ids=lambda frame: type(frame).__name__)
def test_every_frame_survives(subprotocol: str, frame: Frame) -> None:
    """What one side encodes is what the other decodes, and only the side it is meant for takes it."""
    server, client = Codec.server(subprotocol), Codec.client(subprotocol)
    takers = [codec for codec, known in ((server, FROM_CLIENT), (client, FROM_SERVER)) if frame in known]

    for codec in takers:
        assert codec.decode(server.encode(frame)) == frame
    for codec in {server, client} - set(takers):
        with pytest.raises(BadFrame):
            codec.decode(server.encode(frame))


@BY_SUBPROTOCOL
@pytest.mark.parametrize(
    "value",
    [
        ["nonsense", 1],
        ["cancel", 1, 2],
        ["cancel", 0],
        ["cancel", -1],
        ["cancel", True],
        ["cancel", "1"],
        ["cancel", 1 << 40],
        ["ack", 1, 1, 1],
        ["open", 1, "rid", "short", 1, 1],
        ["open", 1, "r" * 129, "A" * 43 + "=", 1, 1],
        ["body", 1, 0, ""],
        ["resume", 1, "rid", "epoch", "short", 0, 1],
        ["resume", 1, "rid", "epoch", "bad token of len", 0, 1],
        ["hello"],
        {"type": "cancel", "sid": 1},
        [],
        None,
        1,
    ],
    ids=repr,
)
def test_what_is_not_a_frame_is_refused(subprotocol: str, value: object) -> None:
    """Unknown names and fields, wrong types and numbers out of range are BadFrame, and nothing is echoed."""
    with pytest.raises(BadFrame) as refusal:
        Codec.server(subprotocol).decode(pack(subprotocol, value))

    assert refusal.value.message == "malformed frame"
    assert refusal.value.param


@BY_SUBPROTOCOL
@given(data=st.binary(max_size=200))
def test_no_bytes_do_more_than_fail(subprotocol: str, data: bytes) -> None:
    """Whatever arrives, decoding gives a frame or a typed error."""
    message = data if subprotocol == MSGPACK else data.decode("utf-8", "replace")
    try:
        assert Codec.server(subprotocol).decode(message)
    except (BadFrame, UnsupportedVersion):
        return


@BY_SUBPROTOCOL
def test_depth_is_bounded(subprotocol: str) -> None:
    """A bomb of nested arrays is a bad frame, not a crash."""
    bomb = b"\x91" * 60_000 if subprotocol == MSGPACK else "[" * 60_000

    with pytest.raises(BadFrame):
        Codec.server(subprotocol).decode(bomb)


@BY_SUBPROTOCOL
def test_size_is_bounded_both_ways(subprotocol: str) -> None:
    """Nothing over the limit is decoded, and nothing over it is sent."""
    codec = Codec.client(subprotocol)
    data = frames.Data(1, 1, 0, "x" * MAX_FRAME, 1)

    with pytest.raises(TooLarge):
        codec.encode(data)
    with pytest.raises(TooLarge):
        codec.decode(pack(subprotocol, data))


@BY_SUBPROTOCOL
def test_a_whole_body_piece_fits_a_frame(subprotocol: str) -> None:
    """Base64 included."""
    piece = frames.Body(1, 0, b"\xff" * BODY_PIECE)

    assert len(Codec.client(subprotocol).encode(piece)) <= MAX_FRAME


@BY_SUBPROTOCOL
def test_the_wrong_kind_of_message_is_refused(subprotocol: str) -> None:
    """Text on the binary subprotocol, bytes on the text one."""
    codec = Codec.server(subprotocol)

    with pytest.raises(BadFrame, match="messages"):
        codec.decode('["ping",1]' if codec.binary else b'["ping",1]')


@BY_SUBPROTOCOL
def test_another_version_is_named_as_such(subprotocol: str) -> None:
    """A later version's HELLO may have more fields; it still learns which version is spoken here."""
    with pytest.raises(UnsupportedVersion) as refusal:
        Codec.server(subprotocol).decode(pack(subprotocol, ["hello", 2, 3, "edge", None, {"new": True}]))

    assert refusal.value.param == "version"


def test_a_token_costs_tens_of_bytes() -> None:
    """The frame that matters most is small."""
    data = frames.Data(7, 300, 1200, " token", 1)

    assert len(Codec.server(MSGPACK).encode(data)) < 32


def test_a_request_survives_its_body() -> None:
    """Every field of a request comes out of the body as it went in."""
    sampling = Sampling(temperature=0.5, seed=1 << 62, stop=("a", "\U0001f600"), logprobs=3, max_tokens=9)
    call = ToolCall(id="1", name="f", arguments='{"a":1}')
    request = ChatRequest(
        id="r",
        model="m",
        messages=(
            Message(role="user", content="héllo"),
            Message(role="assistant", content="", tool_calls=(call,)),
            Message(role="tool", content="2", tool_call_id="1"),
        ),
        sampling=sampling,
        tools=(Tool(name="f", description="d", parameters='{"type":"object"}', strict=True), Tool(name="g")),
        tool_choice="required",
        allowed_tools=("f",),
        parallel_tool_calls=False,
    )
    grammar = Grammar(syntax="regex", text="a+")
    biased = Sampling(logit_bias={5: -1.5}, min_tokens=2, stop_token_ids=(7,))

    assert frames.decode_request(frames.encode_request(request)) == request
    other = ChatRequest(id="r", model="m", prompt="p", grammar=grammar, sampling=biased)
    assert frames.decode_request(frames.encode_request(other)) == other


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            msgspec.msgpack.encode({"id": "r", "model": "m", "prompt": "p", "sampling": {"temperature": 9}}),
            "temperature",
        ),
        (msgspec.msgpack.encode({"id": "r", "model": "m", "messages": [{"role": "s3cret", "content": ""}]}), "role"),
        (msgspec.msgpack.encode({"id": "r", "model": "m"}), "messages"),
        (msgspec.msgpack.encode({"id": "r", "model": "m", "prompt": "s3cret", "extra": 1}), "body"),
        (b"s3cret", "body"),
    ],
)
def test_a_bad_request_names_its_field_and_quotes_nothing(body: bytes, param: str) -> None:
    """The error says where, and holds none of the input."""
    with pytest.raises(BadRequest) as refusal:
        frames.decode_request(body)

    assert refusal.value.param is not None
    assert refusal.value.param.endswith(param)
    assert "s3cret" not in refusal.value.message


def test_text_that_is_not_unicode_is_refused_before_it_is_sent() -> None:
    """A lone surrogate has no UTF-8."""
    with pytest.raises(BadRequest):
        frames.encode_request(ChatRequest(id="r", model="m", prompt="\ud800"))
