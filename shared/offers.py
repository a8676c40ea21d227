"""A signed policy on its way to an edge, in pieces. One at a time; what a lost connection cut off is begun anew."""

from typing import Final

from shared.errors import BadFrame
from shared.frames import BODY_PIECE, MAX_OFFER, Offer

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
