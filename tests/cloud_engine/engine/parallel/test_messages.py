import socket
import struct
import threading

import msgspec
import pytest

from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.parallel.messages import MAX_MESSAGE, Begin, Channel, Load, Reached, Step, ToRank

CHUNK = Chunk(tokens=[3, 4], start=6, table=[9, 1], sampled=1)


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize(
    "message",
    [
        Load(rank=1, path="/m", meeting="/s", threads=2, config=EngineConfig(tensor_parallel=2)),
        Begin(config=EngineConfig(kv_dtype="fp8", kv_scales=((0.5, 2.0),)), text=[1, 2]),
        Step([CHUNK, CHUNK]),
        Step([]),
    ],
)
def test_what_is_sent_is_received(ends, message):
    """Every kind of message arrives as the value it was."""
    ours, theirs = (Channel(end, ToRank) for end in ends)
    ours.send(message)
    assert theirs.receive() == message


def test_a_message_larger_than_any_buffer(ends):
    """A step of megabytes arrives whole, although the socket holds a fraction of it at a time."""
    step = Step([Chunk(tokens=[7] * 10, start=0, table=list(range(1_000_000)), sampled=1)])
    size = len(msgspec.msgpack.encode(step))
    assert size > 4 * ends[0].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    sender = threading.Thread(target=Channel(ends[0], ToRank).send, args=(step,))
    sender.start()
    assert Channel(ends[1], ToRank).receive() == step
    sender.join()


def test_too_large_is_refused_at_both_ends(ends, monkeypatch):
    """Neither is such a message sent, nor is memory taken for a length that somebody claims."""
    ends[0].sendall(struct.pack(">I", MAX_MESSAGE + 1))
    with pytest.raises(ValueError, match="over the limit"):
        Channel(ends[1], ToRank).receive()
    monkeypatch.setattr("cloud_engine.engine.parallel.messages.MAX_MESSAGE", 100)
    with pytest.raises(ValueError, match="over the limit of 100"):
        Channel(ends[0], ToRank).send(Step([CHUNK] * 50))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(Reached("awake")),
        msgspec.msgpack.encode({"type": "Step", "chunks": [{"tokens": ["x"], "start": 0, "table": [], "sampled": 0}]}),
        msgspec.msgpack.encode({"type": "Step", "chunks": [], "more": 1}),
        msgspec.msgpack.encode({"type": "Begin", "config": {"dtype": "int4"}, "text": []}),
    ],
)
def test_what_is_no_message_is_refused(ends, body):
    """Garbage, a message of the other direction, a field of another type, a field too many, an unknown value."""
    ends[0].sendall(struct.pack(">I", len(body)) + body)
    with pytest.raises(ValueError):
        Channel(ends[1], ToRank).receive()


@pytest.mark.parametrize("sent", [b"", b"\0\0", struct.pack(">I", 10) + b"half"])
def test_the_end_is_the_end(ends, sent):
    """A closed end is an error at once, even in the middle of a message."""
    ends[0].sendall(sent)
    ends[0].close()
    with pytest.raises(EOFError):
        Channel(ends[1], ToRank).receive()
