"""What both sides of the wire keep of one connection: its control frames, its liveness and how it is to close."""

from collections import deque
from typing import NamedTuple

from shared.errors import CausewayError, DeadlineExceeded, ProtocolError, RateLimited, SlowConsumer, TooLarge
from shared.frames import Codec, Frame


class Close(NamedTuple):
    """How to close the WebSocket."""

    code: int
    reason: str


GOING_AWAY = Close(1001, "draining")

_CLOSE_CODES: tuple[tuple[type[CausewayError], int], ...] = (
    (ProtocolError, 4400),
    (DeadlineExceeded, 4408),
    (TooLarge, 4413),
    (RateLimited, 4429),
    (SlowConsumer, 4430),
)


def close_for(error: CausewayError) -> Close:
    code = next((code for cls, code in _CLOSE_CODES if isinstance(error, cls)), 1011)
    return Close(code, error.code)


class Connection:
    """What either side keeps of one connection: frames that go out before all data, and when it was last heard."""

    def __init__(self, codec: Codec, now: float, max_control: int) -> None:
        self.codec = codec
        self.heard_at = now
        self.closing: Close | None = None
        self._control: deque[tuple[Frame, float]] = deque()
        self._max_control = max_control

    def control(self, frame: Frame, now: float) -> None:
        """Queue a frame to go out before any data. A peer that asks faster than it reads is cut off."""
        if len(self._control) >= self._max_control:
            self.close(close_for(SlowConsumer("replies are not read")))
        elif self.closing is None:
            self._control.append((frame, now))

    def pop_control(self) -> Frame | None:
        return self._control.popleft()[0] if self._control else None

    @property
    def stuck_since(self) -> float | None:
        return self._control[0][1] if self._control else None

    def close(self, close: Close) -> None:
        self.closing = self.closing or close
