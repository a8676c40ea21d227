"""What the client keeps of one request, across connections: what it sent, what it received, what it owes.

A `Stream` checks every number the server says: sequence, offset, length and hash. Output is handed on only in order and
once, and success is reported only after the whole answer matched. Nothing here does I/O or reads a clock.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import CausewayError, UnknownRequest, Unreachable, Unrecoverable, from_code
from shared.frames import BODY_PIECE, Ack, Body, Data, End, Err, Open, Resume, body_hash, output_bytes
from shared.schemas import Delta


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRules:
    """How long a client waits, in seconds, and how much it takes in, in frames."""

    window: int = 64
    ack_every: int = 32
    ack_within: float = 0.25
    ping_every: float = 5.0
    silent_after: float = 15.0
    """Without any frame for so long, though asked, the connection is dead."""
    welcome_within: float = 5.0
    connect_within: float = 3.0
    reattach_within: float = 2.0
    """For a request whose first token has not come: after this it is free to go elsewhere."""
    resume_ttl: float = 120.0
    cancel_within: float = 30.0
    """How long to keep trying to tell the server of a cancel."""


class Stream:
    """One request as its client sees it. Made by `ClientSession.open`; read with `ClientSession.take`."""

    def __init__(
        self, request_id: str, body: bytes, rules: ClientRules, now: float, notify: Callable[[], None]
    ) -> None:
        self.request_id = request_id
        self.sid = 0
        """On the present connection; 0 while there is none."""
        self.attach = 0
        self.token = ""
        self.since = now
        """Since when it has had no connection."""
        self.opened = False
        """Whether the server may know of it."""
        self.given_up: float | None = None
        """When nobody here wanted it any more: only the server has yet to be told."""
        self.paused = False
        """Detached by the server for slowness; to be resumed once there is room again."""
        self.received = 0
        self.ack_at: float | None = None
        self._rules = rules
        self._notify = notify
        self._body = body
        self._sha256 = body_hash(body)
        self._uploaded = 0
        self._bytes = 0
        self._digest = hashlib.sha256()
        self._inbox: deque[Delta] = deque()
        self._unacked = 0
        self._granted = rules.window
        self._over = False
        self._error: CausewayError | None = None

    # --- what the application takes ---

    @property
    def over(self) -> bool:
        return self._over

    def take(self, now: float) -> Delta | None:
        """The next piece, or None if there is none yet. Raises the stream's error after the last piece."""
        if not self._inbox:
            if self._error is not None:
                raise self._error
            return None
        delta = self._inbox.popleft()
        if not self._over and self._limit() - self._granted >= self._rules.window // 2:
            self.ack_at = now
        return delta

    @property
    def pending(self) -> int:
        """Pieces that can be taken."""
        return len(self._inbox)

    @property
    def drained(self) -> bool:
        return len(self._inbox) <= self._rules.window // 2

    def finish(self, error: CausewayError | None) -> None:
        """Its one end. What was received before an error is still handed on."""
        if not self._over:
            self._over, self._error = True, error
            self.ack_at = None
            self._notify()

    def drop(self) -> None:
        """Nobody reads on."""
        self._over = True
        self._inbox.clear()

    # --- what goes out ---

    def moved_to(self, sid: int) -> None:
        """Go on under this number, on a new connection or after a pause."""
        self.sid, self.opened, self.paused = sid, True, False
        self._uploaded, self._unacked, self.ack_at = 0, 0, None
        self._granted = max(self.received, self._limit())

    def lost(self, now: float) -> None:
        if self.sid:
            self.sid, self.since, self.ack_at = 0, now, None

    @property
    def stranded(self) -> bool:
        """Whether it waits for a connection, or for the server to hear of its cancel."""
        return not self.sid or self.given_up is not None

    def patience(self, server_keeps: float) -> float:
        """Until when it may be stranded. The server keeps its output for so many seconds."""
        rules = self._rules
        if self.given_up is not None:
            return self.given_up + rules.cancel_within
        if self.received or self.paused:
            return self.since + min(rules.resume_ttl, server_keeps)
        return self.since + (rules.reattach_within if self.opened else rules.connect_within)

    def open_frame(self) -> Open:
        window = self._granted - self.received
        return Open(self.sid, self.request_id, self._sha256, len(self._body), window)

    def resume_frame(self, epoch: str) -> Resume:
        self._uploaded = len(self._body)
        return Resume(self.sid, self.request_id, epoch, self.token, self.received, self._granted - self.received)

    def body_frame(self) -> Body | None:
        """The next piece of the request, if any is left to send."""
        off = self._uploaded
        if off >= len(self._body) or not self.sid:
            return None
        self._uploaded = min(off + BODY_PIECE, len(self._body))
        return Body(self.sid, off, self._body[off : self._uploaded])

    def ack_frame(self) -> Ack:
        self.ack_at = None
        self._unacked = 0
        self._granted = max(self._granted, self._limit())
        return Ack(self.sid, self.attach, self.received, max(0, self._granted - self.received))

    # --- what comes in ---

    def accepted(self, attach: int, token: str) -> None:
        if attach > self.attach:
            self.attach, self.token = attach, token
            self._uploaded = len(self._body)

    def on_data(self, frame: Data, now: float, max_output: int) -> None:
        """Raises Unrecoverable if the server lost its place; a repeated frame is ignored."""
        if frame.seq <= self.received:
            return
        output = output_bytes(frame.text, frame.tool_calls)
        if frame.seq != self.received + 1 or frame.off != self._bytes:
            raise Unrecoverable("the stream skipped a piece", source="cloud")
        if self._bytes + len(output) > max_output or frame.seq > self._granted:
            raise Unrecoverable("the server sent more than it may", source="cloud")
        self.received = frame.seq
        self._bytes += len(output)
        self._digest.update(output)
        if self.given_up is None:
            self._inbox.append(_delta(frame))
        self._unacked += 1
        if self._unacked >= self._rules.ack_every or self._limit() - self._granted >= self._rules.window // 2:
            self.ack_at = now
        elif self.ack_at is None:
            self.ack_at = now + self._rules.ack_within
        self._notify()

    def on_end(self, frame: End) -> None:
        """Check the whole answer. Raises Unrecoverable if what arrived is not what was sent."""
        if frame.seq != self.received + 1:
            raise Unrecoverable("the stream ended with pieces missing", source="cloud")
        if frame.total_bytes != self._bytes or frame.sha256 != self._digest.digest():
            raise Unrecoverable("the answer arrived damaged", source="cloud")
        self.received = frame.seq
        if not self._over:
            self._inbox.append(
                Delta(finish_reason=frame.finish_reason, usage=frame.usage, route=frame.route, stop=frame.stop)
            )
        self.finish(None)

    def on_failure(self, frame: Err, error: CausewayError) -> None:
        """Raises Unrecoverable if output that came before this end is missing."""
        if frame.seq and frame.seq != self.received + 1:
            raise Unrecoverable("the stream ended with pieces missing", source="cloud")
        if self.token and not frame.seq and isinstance(error, UnknownRequest | Unrecoverable):
            error = self._unresumed()
        self.received = frame.seq or self.received
        self.finish(error)

    def _unresumed(self) -> CausewayError:
        """A RESUME was refused: with nothing received yet, the caller is still free to go elsewhere."""
        why = "the cloud no longer holds this answer"
        return Unrecoverable(why, source="cloud") if self.received else Unreachable(why, source="cloud")

    def forget_run(self) -> None:
        """The server that knew this request is gone, and nothing of its answer came: it may be opened anew."""
        self.attach, self.token = 0, ""

    def _limit(self) -> int:
        """The last frame number there is room for."""
        return self.received - len(self._inbox) + self._rules.window


def _delta(frame: Data) -> Delta:
    return Delta(text=frame.text, tokens=frame.tokens, logprobs=frame.logprobs, tool_calls=frame.tool_calls)


def error_of(frame: Err) -> CausewayError:
    return from_code(
        frame.code, frame.message, param=frame.param, source=frame.source or "cloud", retry_after=frame.retry_after
    )
