"""A signed policy on its way to an edge, in pieces. One at a time; what a lost connection cut off is begun anew."""

from collections.abc import Callable
from typing import Final, Protocol

from shared.errors import BadFrame
from shared.frames import BODY_PIECE, MAX_OFFER, Fleet, FleetState, Offer

NOTHING_NEW: Final = Offer(version=0, length=0, off=0, data=b"")


class Sending:
    """The server's end."""

    def __init__(self, version: int, signed: bytes) -> None:
        self.version = version
        self._signed, self._off = signed, 0

    @property
    def over(self) -> bool:
        return self._off >= len(self._signed)

    def frame(self) -> Offer:
        off, self._off = self._off, self._off + BODY_PIECE
        return Offer(self.version, len(self._signed), off, self._signed[off : self._off])


class Receiving:
    """The edge's end. Never keeps more than a byte over what a policy may have."""

    def __init__(self) -> None:
        self._first = NOTHING_NEW
        self._got = 0
        self._kept = bytearray()

    def add(self, frame: Offer) -> bytes | None:
        """The whole, once it is there; of one that is too long, as much as shows that. Raises BadFrame."""
        if frame.off == 0:
            self._first, self._got, self._kept = frame, 0, bytearray()
        same = frame.version == self._first.version and frame.length == self._first.length
        if not same or frame.off != self._got or self._got + len(frame.data) > frame.length:
            raise BadFrame("policy piece out of place", param="off")
        wanted, had = min(frame.length, MAX_OFFER + 1), len(self._kept)
        self._got += len(frame.data)
        self._kept += frame.data[: wanted - had]
        return bytes(self._kept) if had < wanted == len(self._kept) else None


class Follower(Protocol):
    """Who takes a fleet's policies at this edge. All calls return at once."""

    def state(self) -> FleetState:
        """What the server is to know; it is told again whenever this has changed."""

    def answered(self) -> None:
        """The server has said what it has, be it nothing new."""

    def offered(self, version: int, signed: bytes, wake: Callable[[], None]) -> None:
        """A policy has come, of which nothing is checked. `wake` is to be called when `state` has changed by it."""


class Following:
    """What the edge's end of one connection has to do with a fleet: nothing, without a follower."""

    def __init__(self, follower: Follower | None) -> None:
        self._follower = follower
        self.told = None if follower is None else follower.state()
        """What the server knows; first said in HELLO."""
        self._answered = False
        """Whether the server has a fleet: only then may it be told of changes."""
        self._receiving = Receiving()

    def on_offer(self, frame: Offer, wake: Callable[[], None]) -> None:
        if self._follower is None:
            raise BadFrame("a policy that nobody asked for", param="frame")
        self._answered = True
        self._follower.answered()
        signed = self._receiving.add(frame)
        if signed is not None:
            self._follower.offered(frame.version, signed, wake)

    def next_state(self) -> Fleet | None:
        """The server hears of each change, whoever made it, with what is sent next: a ping at the latest."""
        if self._follower is None or not self._answered or (state := self._follower.state()) == self.told:
            return None
        self.told = state
        return Fleet(state)
