from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.gateway.events import EventStream
from shared.errors import UpstreamFailed

STREAM = (
    b": hello\r\n\r\ndata: one\n\nevent: x\rdata:two\rdata: three\r\rid: 4\n\ndata\n\ndata: [DONE]\r\n\r\ndata: cut"
)
EVENTS = [b"one", b"two\nthree", b"", b"[DONE]"]


@settings(max_examples=60)
@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_how_the_bytes_are_cut(cuts: list[int]) -> None:
    """Any line ending, comments, other fields, several data lines: the same events for every cut."""
    stream, edges = EventStream(), [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[start:end] for start, end in pairwise(edges)]
    assert [event for piece in pieces for event in stream.feed(piece)] == EVENTS


def test_a_byte_order_mark_is_passed_over() -> None:
    """The first event is not lost to it."""
    assert EventStream().feed(b"\xef\xbb\xbfdata: 1\n\n") == [b"1"]


@pytest.mark.parametrize("piece", [b"x" * 40, b"data: yyyyyyyyyyyy\n", b"data: " + b"z" * 200 + b"\n\n"])
def test_an_event_has_a_largest_size(piece: bytes) -> None:
    """A line without end, an event without end, one that is too long in one piece: refused while it is still small."""
    stream = EventStream(max_event=100)
    with pytest.raises(UpstreamFailed, match="100 bytes"):
        for _ in range(20):
            stream.feed(piece)


def test_many_events_together_may_be_larger() -> None:
    """The limit is each event's own."""
    stream = EventStream(max_event=100)
    assert len(stream.feed(b"data: 0123456789\n\n" * 50)) == 50
