"""The wire's rules one by one: what a session says, refuses, keeps and forgets."""

import math

import pytest
from fakes import text_of
from wires import World

from shared import frames
from shared.connection import Close
from shared.errors import Internal, Overloaded, PolicyDenied, RateLimited, TooLarge, Unreachable, Unrecoverable
from shared.executions import Execution, Rules
from shared.frames import MAX_FRAME, SUBPROTOCOLS, Codec, Frame, Limits, body_hash, encode_request
from shared.schemas import ChatRequest, Delta, TokenLogprob, TopLogprob, Usage
from shared.streams import ClientRules, Stream

LAST = Delta(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2))


def say(text: str) -> Delta:
    return Delta(text=text, tokens=1)


def running(world: World, request_id: str = "r") -> tuple[Stream, Execution]:
    """An accepted request."""
    if world.cable is None:
        world.connect()
    stream = world.open(request_id)
    world.settle()
    return stream, world.started[-1][0]


def sent(world: World) -> list[Frame]:
    """What the server would now send, taken out of the world."""
    assert world.cable is not None
    codec = Codec.client(world.subprotocol)
    taken: list[Frame] = []
    while (message := world.cable.session.next_message(world.now)) is not None:
        taken.append(codec.decode(message))
    return taken


def forge(world: World, frame: Frame) -> None:
    """The server says something that its session would not."""
    world.client.receive(Codec.server(world.subprotocol).encode(frame), world.now)


@pytest.mark.parametrize("subprotocol", SUBPROTOCOLS)
def test_the_first_text_goes_at_once_and_later_ones_together(subprotocol: str) -> None:
    """No token waits for another at the start; afterwards those within 40 ms share a frame and a number."""
    world = World(subprotocol)
    _, execution = running(world)
    execution.produce(Delta(tokens=1), world.now)
    execution.produce(say("one"), world.now)
    assert [getattr(frame, "text", None) for frame in sent(world)] == ["", "one"]

    execution.produce(say(" two"), world.now)
    world.now += 0.039
    execution.produce(say(" three"), world.now)
    assert sent(world) == []
    world.now += 0.002
    (frame,) = sent(world)

    assert isinstance(frame, frames.Data)
    assert (frame.seq, frame.off, frame.text, frame.tokens) == (3, 3, " two three", 2)


def test_control_goes_before_data_and_streams_take_turns() -> None:
    """A long answer does not hold up a short one, nor either of them a reply to a ping."""
    world = World()
    _, long = running(world, "long")
    _, short = running(world, "short")
    long.produce(say("x" * 12_000), world.now)
    short.produce(say("y"), world.now)
    assert world.cable is not None
    world.cable.session.receive(Codec.client(world.subprotocol).encode(frames.Ping(5)), world.now)

    names = [frame.text[:1] if isinstance(frame, frames.Data) else type(frame).__name__ for frame in sent(world)]

    assert names == ["Pong", "x", "y", "x", "x"]


def test_a_long_prompt_does_not_hold_up_a_short_one() -> None:
    """Bodies go in pieces, in turn: the second request is whole long before the first."""
    world = World()
    world.connect()
    world.settle()
    for request_id, size in (("long", 500_000), ("short", 100)):
        world.client.open(ChatRequest(id=request_id, model="m", prompt="p" * size), world.now, lambda: None)
    world.settle()

    assert [request.id for _, request in world.started] == ["short", "long"]


def test_credit_stops_a_stream_and_only_it() -> None:
    """The window counts frames; the end needs no credit but comes after everything."""
    world = World(client_rules=ClientRules(window=2))
    stream, execution = running(world)
    _, other = running(world, "other")
    for _ in range(5):
        execution.produce(say("x" * 4096), world.now)
    execution.produce(LAST, world.now)
    other.produce(say("y"), world.now)

    first = sent(world)
    assert [type(frame).__name__ for frame in first] == ["Data", "Data", "Data"]
    for frame in first:
        forge(world, frame)
    world.wait(0.3)
    world.settle()
    assert stream.pending == 2, "what was not taken gives no credit back"
    got = ""
    while not stream.over or stream.pending:
        got += text_of(world.take_all(stream))
        world.wait(0.3)
        world.settle()

    assert got == "x" * 4096 * 5


def test_output_is_bounded() -> None:
    """An answer over the limit ends with too_large, after what was within it; its log is no larger."""
    world = World(rules=Rules(limits=Limits(max_output=10_000)))
    stream, execution = running(world)
    for _ in range(20):
        execution.produce(say("x" * 1000), world.now)
    world.settle()

    assert execution.ended
    assert len(text_of(world.take_all(stream))) <= 10_000
    with pytest.raises(TooLarge):
        world.client.take(stream, world.now)


def test_a_slow_reader_holds_its_engine_back() -> None:
    """Past the run-ahead there is no room until something is acknowledged."""
    world = World(rules=Rules(run_ahead=8192))
    _, execution = running(world)
    told: list[bool] = []
    execution.on_room = lambda: told.append(execution.room)
    while execution.room:
        execution.produce(say("x" * 4096), world.now)
    assert not told
    world.settle()
    world.wait(0.3)
    world.settle()

    assert told[-1]


def test_every_frame_fits_whatever_the_engine_says() -> None:
    """Control characters that JSON writes sixfold, twenty rivals a token, infinite log probabilities, long pieces cut
    between characters: all arrives, in frames within the limit."""
    top = tuple(TopLogprob("\x00" * 20, -math.inf, tuple(b"\x00" * 20)) for _ in range(20))
    entry = TokenLogprob("\x01" * 20, -math.inf, tuple(b"\x01" * 20), top)
    text = "\x01" * 5000 + "\U0001f600" * 3000
    for subprotocol in SUBPROTOCOLS:
        world = World(subprotocol, Rules(run_ahead=1 << 20))
        stream, execution = running(world)
        execution.produce(Delta(text=text, tokens=40, logprobs=(entry,) * 40), world.now)
        execution.produce(LAST, world.now)
        world.settle()
        got = world.take_all(stream)

        assert text_of(got) == text
        assert sum(delta.tokens for delta in got) == 40
        logprobs = [entry for delta in got for entry in delta.logprobs]
        assert len(logprobs) == 40
        assert logprobs[0].logprob == -9999.0
        assert len(got) > 4


@pytest.mark.parametrize(
    "lie",
    [
        frames.Data(1, 3, 3, "x", 1),
        frames.Data(1, 2, 4, "x", 1),
        frames.Data(1, 2, 3, "x" * (MAX_FRAME // 2), 1),
        frames.End(1, 3, "stop", None, 3, b"h" * 32),
        frames.End(1, 2, "stop", None, 4, b"h" * 32),
        frames.End(1, 2, "stop", None, 3, b"h" * 32),
        frames.Err(1, 7, "internal", "m"),
    ],
    ids=["gap", "offset", "too much", "end too early", "length", "hash", "error too early"],
)
def test_a_server_that_lost_its_place_fails_that_stream_openly(lie: Frame) -> None:
    """After what was right, Unrecoverable; the cloud is told to stop; other streams of the connection go on."""
    world = World(rules=Rules(limits=Limits(max_output=10_000)))
    stream, execution = running(world)
    other_stream, other = running(world, "other")
    execution.produce(say("one"), world.now)
    world.settle()
    forge(world, lie)
    other.produce(say("fine"), world.now)
    world.settle()

    assert text_of(world.take_all(stream)) == "one"
    with pytest.raises(Unrecoverable):
        world.client.take(stream, world.now)
    assert text_of(world.take_all(other_stream)) == "fine"
    assert world.client.up


def test_a_repeated_frame_is_not_output_twice() -> None:
    """Neither a repeated DATA nor a repeated END has any effect."""
    world = World()
    stream, execution = running(world)
    execution.produce(say("one"), world.now)
    execution.produce(LAST, world.now)
    for frame in sent(world):
        forge(world, frame)
        forge(world, frame)

    assert [delta.text for delta in world.take_all(stream)] == ["one", ""]
    assert world.client.take(stream, world.now) is None, "and no error after it"


def test_a_stream_that_never_was_ends_the_connection_not_the_requests() -> None:
    """DATA for an unheard-of stream: the server is confused, the client leaves and resumes."""
    world = World()
    stream, execution = running(world)
    forge(world, frames.Data(99, 1, 0, "x", 1))
    assert world.client.closing == Close(4400, "bad_frame")
    world.hang_up()
    execution.produce(say("one"), world.now)
    execution.produce(LAST, world.now)
    world.connect()
    world.settle()

    assert text_of(world.take_all(stream)) == "one"


def test_two_uploads_of_one_request_are_one_execution() -> None:
    """Opened on two connections before either body is whole: it runs once, and the later one reads it."""
    world = World()
    codec = Codec.client(world.subprotocol)
    body = encode_request(ChatRequest(id="r", model="m", prompt="p"))
    opened = frames.Open(1, "r", body_hash(body), len(body), 64)
    cables = [world.plug(), world.plug()]
    for frame in (frames.Hello(1, 1), opened, frames.Body(1, 0, body)):
        for cable in cables:
            world.deliver_up(cable, [codec.encode(frame)])
    ((execution, _),) = world.started
    execution.produce(LAST, world.now)
    world.fill()
    received = [[type(codec.decode(message)).__name__ for message in cable.down.move()] for cable in cables]

    assert received == [["Welcome", "Accept", "Err"], ["Welcome", "Accept", "End"]]


def test_resume_continues_after_what_arrived() -> None:
    """Also when RESUMED itself is lost, twice: the token before the newest is still good."""
    world = World()
    stream, execution = running(world)
    execution.produce(say("one "), world.now)
    world.settle()
    for _ in range(2):
        world.cut()
        cable = world.connect()
        world.fill()
        world.deliver_up(cable, cable.up.move())
        world.fill()
        world.deliver_down(cable, cable.down.move())
        world.fill()
        world.deliver_up(cable, cable.up.move())  # RESUME arrives; its answer does not
        assert execution.attached is not None
    world.cut()
    execution.produce(say("two"), world.now)
    execution.produce(LAST, world.now)
    world.connect()
    world.settle()

    assert text_of(world.take_all(stream)) == "one two"
    assert len(world.started) == 1
    assert len(world.registry) == 0


@pytest.mark.parametrize("produced", [0, 1])
def test_a_restarted_server_is_told_apart(produced: int) -> None:
    """With output received: Unrecoverable. Without: the request is opened anew, since nobody saw anything."""
    world = World()
    stream, execution = running(world)
    for _ in range(produced):
        execution.produce(say("old "), world.now)
    world.settle()
    world.restart()
    world.connect()
    world.settle()

    if produced:
        assert text_of(world.take_all(stream)) == "old "
        with pytest.raises(Unrecoverable, match="restarted"):
            world.client.take(stream, world.now)
    else:
        world.started[-1][0].produce(say("new"), world.now)
        world.settle()
        assert text_of(world.take_all(stream)) == "new"
    assert len(world.started) == 2 - produced


def test_the_grace_and_the_resume_time_end() -> None:
    """Unattached while running: abandoned after the grace. Ended and unread: forgotten after the resume time."""
    world = World()
    stream, execution = running(world)
    execution.produce(say("one"), world.now)
    world.settle()
    world.cut()
    assert world.registry.next_deadline() == 30.0
    world.wait(29.9)
    assert not execution.ended
    world.wait(0.2)
    assert execution.outcome == "abandoned"
    world.connect()
    world.settle()
    assert text_of(world.take_all(stream)) == "one"
    with pytest.raises(Unrecoverable, match="abandoned"):
        world.client.take(stream, world.now)

    _, execution = running(world, "second")
    execution.produce(LAST, world.now)
    world.cut()
    assert len(world.registry) == 1
    world.wait(120.1)
    assert len(world.registry) == 0


def test_before_its_first_token_a_lost_request_is_given_back() -> None:
    """Retryable, in two seconds; and the cloud is told to stop once it is reached again."""
    world = World()
    stream, execution = running(world)
    world.cut()
    world.wait(1.9)
    assert world.client.take(stream, world.now) is None
    world.wait(0.2)
    with pytest.raises(Unreachable) as failure:
        world.client.take(stream, world.now)
    assert failure.value.retryable
    world.connect()
    world.settle()

    assert execution.outcome == "cancelled"
    assert world.stopped == [execution]


@pytest.mark.parametrize("moment", ["before it is sent", "half sent", "accepted", "speaking", "ended"])
def test_a_cancel_is_harmless_at_any_time(moment: str) -> None:
    """One terminal state, nothing kept on either side; said twice, it is said once."""
    world = World()
    world.connect()
    world.settle()
    stream = world.client.open(ChatRequest(id="r", model="m", prompt="p" * 100_000), world.now, lambda: None)
    if moment == "half sent":
        assert world.cable is not None
        world.fill()
        world.deliver_up(world.cable, world.cable.up.move(40_000))
    elif moment != "before it is sent":
        world.settle()
        execution = world.started[0][0]
        if moment == "speaking":
            execution.produce(say("one"), world.now)
        elif moment == "ended":
            execution.produce(LAST, world.now)
    world.client.cancel(stream, world.now)
    world.client.cancel(stream, world.now)
    world.settle()
    world.wait(0.3)
    world.settle()

    assert [execution.ended for execution, _ in world.started] == [True] * len(world.started)
    assert len(world.registry) == 0
    world.cut()
    assert not world.client.wants_connection


def test_the_first_end_wins() -> None:
    """Whatever comes after an end changes nothing."""
    world = World()
    stream, execution = running(world)
    execution.produce(LAST, world.now)
    execution.cancel(world.now)
    execution.fail(Internal("late"), world.now)
    execution.produce(say("late"), world.now)
    world.settle()

    assert execution.outcome == "done"
    assert [delta.finish_reason for delta in world.take_all(stream)] == ["stop"]


def test_a_tenants_executions_are_bounded() -> None:
    """One too many is rate_limited; an answer that nobody fetched makes room, a running request never does."""
    world = World(rules=Rules(max_per_tenant=2))
    _, first = running(world, "r1")
    running(world, "r2")
    refused = world.open("r3")
    world.settle()
    with pytest.raises(RateLimited):
        world.client.take(refused, world.now)

    first.produce(LAST, world.now)
    world.cut()
    world.registry.create("tenant", "r4", b"h" * 32)
    assert {execution.request_id for execution in world.registry.executions()} == {"r2", "r4"}
    with pytest.raises(RateLimited):
        world.registry.create("tenant", "r5", b"h" * 32)
    world.registry.create("another", "r5", b"h" * 32)


def test_a_flood_of_pings_by_a_peer_that_does_not_read_is_cut_off() -> None:
    """Replies wait in a bounded queue; when it is full the connection is closed with 4430."""
    world = World()
    cable = world.connect()
    world.settle()
    ping = Codec.client(world.subprotocol).encode(frames.Ping(1))
    for _ in range(300):
        cable.session.receive(ping, world.now)

    assert cable.session.closing == Close(4430, "slow_consumer")


def test_replies_that_nobody_takes_close_the_connection() -> None:
    """A control frame unsent for ten seconds: the peer does not read at all."""
    world = World()
    cable = world.connect()
    world.settle()
    cable.session.receive(Codec.client(world.subprotocol).encode(frames.Ping(1)), world.now)
    assert cable.session.next_deadline() == 10.0
    world.now = 10.0
    cable.session.tick(world.now)

    assert cable.session.closing == Close(4430, "slow_consumer")


def test_a_silent_client_is_left() -> None:
    """Nothing heard for a minute: closed, and what it asked for waits out its grace without it."""
    world = World()
    _, execution = running(world)
    cable = world.cable
    assert cable is not None
    world.wait(59.9)
    assert cable.session.closing is None
    world.wait(0.2)
    assert cable.session.closing == Close(4408, "deadline_exceeded")
    world.server_lost(cable)
    assert not execution.ended
    world.wait(30.0)
    assert execution.outcome == "abandoned"


def test_a_silent_server_is_left() -> None:
    """The client pings; without any answer it closes, and its requests wait to be resumed."""
    world = World()
    running(world)
    for _ in range(16):
        world.now += 1.0
        world.client.tick(world.now)

    assert world.client.closing == Close(4408, "deadline_exceeded")


def test_a_private_request_never_becomes_bytes() -> None:
    """The last check before the wire is in the session itself, connected or not."""
    world = World()
    world.connect()
    world.settle()
    with pytest.raises(PolicyDenied):
        world.client.open(ChatRequest(id="r", model="m", prompt="p", label="edge_only"), 0.0, lambda: None)
    assert world.client.next_message(0.0) is None


def test_what_the_server_would_refuse_is_not_sent() -> None:
    """Too large, too many, or draining: known at the client, said at the client."""
    world = World(rules=Rules(limits=Limits(max_streams=1, max_prompt=1000)))
    running(world)
    with pytest.raises(Overloaded):
        world.open("r2")
    with pytest.raises(TooLarge):
        world.client.open(ChatRequest(id="r3", model="m", prompt="p" * 1000), world.now, lambda: None)
    assert world.cable is not None
    world.cable.session.goaway("draining", 5.0, 2.0, world.now)
    world.settle()
    with pytest.raises(Overloaded) as refusal:
        world.open("r4")
    assert refusal.value.retry_after == 2.0
