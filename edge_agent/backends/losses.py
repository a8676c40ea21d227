"""What gets lost on the way to the cloud: segments that the kernel had to send again, connections that were cut.

Sums fade by half every HALF_S, so that what they say is of the last minutes. Segments are counted of what this side
sends: what the other has to send again nobody tells us, and it is taken to be as much.
"""

import socket
import struct
from dataclasses import dataclass
from typing import Final, Protocol

from router.features import Trouble

HALF_S: Final = 300.0
LEAST_SEGMENTS: Final = 20.0
"""With fewer, one that was lost would be a large share of them."""
LEAST_UP_S: Final = 60.0
"""The same for a cut soon after the connection was made."""
RECONNECT_GAIN: Final = 0.25

_RTO, _TOTAL_RETRANS, _DATA_SEGS_OUT, _SIZE = 8, 100, 156, 160
"""Where Linux's `struct tcp_info` (include/uapi/linux/tcp.h) holds them, each of 32 bits; the first in microseconds."""


class Socket(Protocol):
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Segments:
    """Of one connection, since its beginning: with data in them, and of these sent again."""

    sent: int
    again: int
    resend_s: float
    """After how long the kernel would send one again now."""


def segments(connection: Socket) -> Segments | None:
    """None where the system does not tell (only Linux does), or the socket is closed."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return None
    if len(info) < _SIZE:
        return None
    rto, again, sent = (struct.unpack_from("=I", info, at)[0] for at in (_RTO, _TOTAL_RETRANS, _DATA_SEGS_OUT))
    return Segments(sent, again, rto / 1e6)


class Losses:
    """Told of what becomes of the connections, one at a time; `now` is any clock that never runs backwards."""

    def __init__(self) -> None:
        self._at = 0.0
        self._up = False
        self._up_s = self._cuts = self._sent = self._again = 0.0
        self._last: Segments | None = None
        self._resend_s: float | None = None
        self._trying_since: float | None = None
        self._reconnect_s: float | None = None

    def trying(self, now: float) -> None:
        """A connection is wanted; harmless when repeated."""
        if self._trying_since is None:
            self._trying_since = now

    def working(self, now: float) -> None:
        """The cloud has greeted; harmless when repeated."""
        if self._trying_since is None:
            return
        self._faded(now)
        took, before = now - self._trying_since, self._reconnect_s
        self._reconnect_s = took if before is None else before + RECONNECT_GAIN * (took - before)
        self._trying_since, self._up = None, True

    def seen(self, counts: Segments | None, now: float) -> None:
        """What the kernel counted of the present connection until now."""
        if counts is None:
            return
        self._faded(now)
        before = self._last or Segments(0, 0, 0.0)
        self._sent += max(0, counts.sent - before.sent)
        self._again += max(0, counts.again - before.again)
        self._last, self._resend_s = counts, counts.resend_s

    def ended(self, now: float, *, cut: bool) -> None:
        """The connection is gone. `cut`: nobody meant it to be."""
        self._faded(now)
        self._cuts += cut and self._up
        self._up, self._last = False, None

    def reading(self, now: float) -> Trouble:
        self._faded(now)
        return Trouble(
            loss=None if self._resend_s is None else min(1.0, self._again / max(self._sent, LEAST_SEGMENTS)),
            resend_s=self._resend_s,
            cuts_per_s=self._cuts / max(self._up_s, LEAST_UP_S) if self._reconnect_s is not None else None,
            reconnect_s=self._reconnect_s,
        )

    def _faded(self, now: float) -> None:
        past, self._at = max(0.0, now - self._at), now
        keep = 0.5 ** (past / HALF_S)
        self._up_s = self._up_s * keep + (past if self._up else 0.0)
        self._cuts, self._sent, self._again = self._cuts * keep, self._sent * keep, self._again * keep
