"""A policy on the wire: whole or not at all, between other frames, to those alone who asked."""

import itertools

import msgspec
import pytest
from fleets import signed
from wires import World

from shared import frames
from shared.errors import BadFrame
from shared.frames import BODY_PIECE, JSON, MAX_OFFER, MSGPACK, SUBPROTOCOLS, Codec, FleetState, Hello, Offer
from shared.offers import Receiving, Sending
from shared.schemas import Delta

LARGE = signed(5, "# " + "x" * 100_000)


class Follower:
    """Takes whatever it is offered."""

    def __init__(self) -> None:
        self.got: list[tuple[int, bytes]] = []
        self.said = FleetState(edge="e")
        self.answers = 0

    def state(self) -> FleetState:
        return self.said

    def answered(self) -> None:
        self.answers += 1

    def offered(self, version: int, signed: bytes, wake: object) -> None:
        self.got.append((version, signed))
        self.said = FleetState(edge="e", seen=version, using=version)


def world(subprotocol: str = MSGPACK) -> tuple[World, Follower]:
    follower = Follower()
    made = World(subprotocol, follower=follower)
    made.connect()
    made.settle()
    return made, follower


@pytest.mark.parametrize("subprotocol", SUBPROTOCOLS)
def test_a_policy_arrives_whole_and_the_edge_says_what_it_has(subprotocol: str) -> None:
    """HELLO asks, OFFERs bring it in pieces, FLEET tells the new state; without an OFFER nobody says FLEET."""
    there, follower = world(subprotocol)
    assert [(one.tenant, one.state) for one in there.reported] == [("tenant", FleetState(edge="e"))]
    follower.said = FleetState(edge="e", group="kiosk")
    there.settle()
    assert len(there.reported) == 1

    there.reported[0].session.offer(5, LARGE)
    there.settle()

    assert follower.got == [(5, LARGE)]
    assert there.seen["Offer"] == -(-len(LARGE) // BODY_PIECE)
    assert there.reported[-1].state.using == 5


def test_that_there_is_nothing_new_is_said_once() -> None:
    """From then on the edge tells of its changes."""
    there, follower = world()
    for _ in range(3):
        there.reported[0].session.offer(0, b"")
        there.settle()
    assert (there.seen["Offer"], follower.got) == (1, [])
    follower.said = FleetState(edge="e", using=1, seen=1)
    there.settle()
    assert there.reported[-1].state == follower.said


def test_a_cut_policy_is_never_handed_on_and_comes_again() -> None:
    """S-07: cut at every point of its way, it is begun anew on the next connection."""
    there, follower = world()
    cuts = range(1, len(LARGE) + 2000, 9973)
    for count in cuts:
        there.reported[-1].session.offer(5, LARGE)
        there.fill()
        assert there.cable is not None
        there.deliver_down(there.cable, there.cable.down.move(count))
        if follower.got:
            break
        there.cut()
        there.connect()
        there.settle()
    assert there.seen["cut inside a message"] > 5
    assert follower.got in ([], [(5, LARGE)])
    there.reported[-1].session.offer(5, LARGE)
    there.settle()
    assert follower.got == [(5, LARGE)]


def test_a_newer_policy_takes_the_place_of_one_on_its_way() -> None:
    """The same one once more changes nothing."""
    there, follower = world()
    session = there.reported[0].session
    session.offer(5, LARGE)
    assert there.cable is not None
    there.cable.down.put(session.next_message(0) or b"")
    session.offer(5, LARGE)
    session.offer(6, signed(6))
    there.settle()
    assert follower.got == [(6, signed(6))]


def test_answers_and_a_policy_take_turns() -> None:
    """A token waits for one piece at most, and the policy for one frame of output at most."""
    there, _ = world()
    there.open("r")
    there.settle()
    execution = there.started[-1][0]
    there.reported[0].session.offer(5, LARGE)
    for number in range(4):
        execution.produce(Delta(text=f"{number}" * 5000, tokens=1), there.now)
        execution.flush(there.now)
    codec, kinds = Codec.client(MSGPACK), []
    while (message := there.reported[0].session.next_message(there.now)) is not None:
        kinds.append(type(codec.decode(message)).__name__)
    both = min(kinds.count("Data"), kinds.count("Offer"))
    assert both >= 4
    assert all(one != two for one, two in itertools.pairwise(kinds[: 2 * both - 1]))


def test_who_did_not_ask_is_told_nothing_and_may_say_nothing() -> None:
    """An edge without a fleet reports none; a FLEET or an OFFER out of place costs the connection that said it."""
    plain = World()
    cable = plain.connect()
    plain.settle()
    assert plain.reported == []
    plain.client.receive(Codec.server(MSGPACK).encode(Offer(1, 0, 0, b"")), plain.now)
    assert plain.client.closing is not None
    cable.session.receive(Codec.client(MSGPACK).encode(frames.Fleet(FleetState(edge="e"))), plain.now)
    assert cable.session.closing is not None
    assert cable.session.closing.code == 4400


@pytest.mark.parametrize("subprotocol", SUBPROTOCOLS)
def test_peers_of_before_fleets_are_understood_and_understand(subprotocol: str) -> None:
    """A HELLO without the field is one, and one with it is to a server that never heard of it."""

    class Old(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
        vmin: int
        vmax: int
        client: str = ""

    pack, decode = (
        (msgspec.json.encode, lambda raw: msgspec.json.decode(raw, type=Old))
        if subprotocol == JSON
        else (msgspec.msgpack.encode, lambda raw: msgspec.msgpack.decode(raw, type=Old))
    )
    old = pack(["hello", 1, 1, "old"])
    hello = Codec.server(subprotocol).decode(old.decode() if subprotocol == JSON else old)
    assert isinstance(hello, Hello)
    assert hello.fleet is None
    new = Codec.client(subprotocol).encode(Hello(1, 1, "new", FleetState(edge="e")))
    assert decode(new).client == "new"


def test_pieces_out_of_place_are_a_breach() -> None:
    """Gaps, other lengths and other versions in between; more than was announced."""
    for second in (
        Offer(1, 10, 6, b"12345"),
        Offer(1, 11, 5, b"12345"),
        Offer(2, 10, 5, b"12345"),
        Offer(1, 10, 5, b"123456"),
    ):
        receiving = Receiving()
        assert receiving.add(Offer(1, 10, 0, b"12345")) is None
        with pytest.raises(BadFrame):
            receiving.add(second)


def test_what_is_too_long_is_not_kept() -> None:
    """As much is handed on as shows that; the rest is let go, and the next policy is received."""
    receiving, length = Receiving(), 3 * MAX_OFFER
    sending = Sending(1, b"x" * length)
    handed = [len(whole) for _ in range(-(-length // BODY_PIECE)) if (whole := receiving.add(sending.frame()))]
    assert handed == [MAX_OFFER + 1]
    assert receiving.add(Offer(2, 3, 0, b"abc")) == b"abc"
