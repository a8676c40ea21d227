"""The client's side of the wire: one `ClientSession` that outlives its connections and carries many requests.

Its shell connects when `wants_connection`, calls `connected`, pumps messages as `shared/session.py` says, and calls
`lost` or `refused` when the connection ends. The rules of what then becomes of each request are here: before its first
token a request is soon given back to the caller, who may go elsewhere; after it, it is resumed or fails openly.
No I/O, no clock.
"""

from collections import deque
from collections.abc import Callable

from shared.connection import Close, Connection, close_for
from shared.errors import (
    BadFrame,
    CausewayError,
    DeadlineExceeded,
    Overloaded,
    PolicyDenied,
    RequestConflict,
    SlowConsumer,
    TooLarge,
    Unreachable,
    Unrecoverable,
    from_code,
)
from shared.frames import (
    PROTOCOL_VERSION,
    Accept,
    Cancel,
    Codec,
    Data,
    End,
    Err,
    Frame,
    Goaway,
    Hello,
    Limits,
    Offer,
    Ping,
    Pong,
    Resumed,
    Welcome,
    encode_request,
)
from shared.offers import Follower, Following
from shared.schemas import ChatRequest, Delta, ModelCard
from shared.streams import ClientRules, Stream, error_of

MAX_CONTROL = 1024


class ClientSession:
    """All requests of one client to one server, and the present connection, if there is one.

    `wake` is called when there may be something to send, or a connection to make.
    """

    def __init__(
        self, rules: ClientRules, client: str, wake: Callable[[], None], follower: Follower | None = None
    ) -> None:
        self.limits = Limits()
        self.models: tuple[ModelCard, ...] = ()
        """What the server said it serves."""
        self.round_trip: float | None = None
        """Smoothed, in seconds."""
        self.last_error: CausewayError | None = None
        self.draining = False
        self.reconnect_after = 0.0
        self._rules = rules
        self._client = client
        self._wake = wake
        self._epoch = ""
        self._wire: Connection | None = None
        self._welcomed = False
        self._connected_at = 0.0
        self._pinged_at = 0.0
        self._ping = 0
        self._highest = 0
        self._streams: list[Stream] = []
        self._by_sid: dict[int, Stream] = {}
        self._uploads: deque[Stream] = deque()
        self._follower = follower
        self._fleet = Following(None)

    # --- the application ---

    def open(self, request: ChatRequest, now: float, notify: Callable[[], None]) -> Stream:
        """Send a request as soon as there is a connection. `notify` is called whenever `take` has news.

        Raises PolicyDenied for a request that must stay on the device: the last check before bytes exist. Raises
        TooLarge, BadRequest, RequestConflict and, when the server would refuse it anyway, Overloaded.
        """
        if request.label != "free":
            raise PolicyDenied(f"labelled {request.label}: must not leave the device", param="label", source="edge")
        body = encode_request(request)
        if len(body) > self.limits.max_prompt:
            raise TooLarge(f"request over {self.limits.max_prompt} bytes", param="messages")
        if self.draining:
            raise Overloaded("the cloud is draining", source="cloud", retry_after=self.reconnect_after)
        if len(self._streams) >= self.limits.max_streams:
            raise Overloaded(f"at most {self.limits.max_streams} requests at once", source="edge", retry_after=1.0)
        if any(stream.request_id == request.id and not stream.over for stream in self._streams):
            raise RequestConflict("a request with this id is running", param="id", source="edge")
        stream = Stream(request.id, body, self._rules, now, notify)
        self._streams.append(stream)
        if self._welcomed:
            self._send_open(stream, now)
        self._wake()
        return stream

    def take(self, stream: Stream, now: float) -> Delta | None:
        """The stream's next piece, or None. Raises its error once everything before it was taken."""
        delta = stream.take(now)
        if stream.paused and stream.drained and self._welcomed:
            self._send_resume(stream, now)
        if delta is not None and (stream.ack_at == now or stream.paused):
            self._wake()
        return delta

    def cancel(self, stream: Stream, now: float) -> None:
        """Nobody reads on. The server is told now, or when it can be reached again; harmless at any time."""
        if stream not in self._streams or stream.given_up is not None:
            return
        stream.drop()
        stream.given_up = now
        if not stream.opened:
            self._forget(stream)
        elif stream.sid and self._wire is not None:
            self._wire.control(Cancel(stream.sid), now)
        self._wake()

    def abandon(self, now: float) -> None:
        """Close for good: every request is cancelled, and its reader told that the link is gone."""
        for stream in list(self._streams):
            stream.finish(Unreachable("the connection to the cloud is closed", source="edge"))
            self.cancel(stream, now)

    @property
    def wants_connection(self) -> bool:
        return self._wire is None and bool(self._streams)

    @property
    def up(self) -> bool:
        return self._welcomed

    @property
    def closing(self) -> Close | None:
        return None if self._wire is None else self._wire.closing

    # --- the connection's life ---

    def connected(self, codec: Codec, now: float) -> None:
        self._wire = Connection(codec, now, MAX_CONTROL)
        self._connected_at = now
        self._highest = 0
        self._fleet = Following(self._follower)
        self._wire.control(Hello(PROTOCOL_VERSION, PROTOCOL_VERSION, self._client, self._fleet.told), now)

    def lost(self, now: float) -> None:
        """The connection ended, for whatever reason. Requests with output wait to be resumed, for a while."""
        self._wire, self._welcomed, self.draining = None, False, False
        self._by_sid.clear()
        self._uploads.clear()
        for stream in self._streams:
            stream.lost(now)

    def refused(self, error: CausewayError) -> None:
        """No connection could be made. Requests that the server has not seen fail at once."""
        self.last_error = error
        for stream in list(self._streams):
            if not stream.opened:
                stream.finish(_again(error))
                self._forget(stream)

    def _on_welcome(self, frame: Welcome, now: float) -> None:
        if self._welcomed or frame.version != PROTOCOL_VERSION:
            raise BadFrame("unexpected WELCOME", param="frame")
        restarted = self._epoch not in ("", frame.epoch)
        self._epoch, self._welcomed, self.last_error = frame.epoch, True, None
        self.limits, self.models = frame.limits, frame.models
        self._measure(now - self._connected_at)
        self._pinged_at = now
        for stream in list(self._streams):
            self._reattach(stream, restarted, now)

    def _reattach(self, stream: Stream, restarted: bool, now: float) -> None:
        if restarted and stream.received:
            stream.finish(Unrecoverable("the cloud restarted; the rest of this answer is lost", source="cloud"))
        if restarted and (stream.over or stream.given_up is not None):
            return self._forget(stream)
        if restarted:
            stream.forget_run()
        return self._send_resume(stream, now) if stream.token else self._send_open(stream, now)

    def _send_open(self, stream: Stream, now: float) -> None:
        self._move(stream)
        self._control(stream.open_frame(), now)
        if stream.given_up is None:
            self._uploads.append(stream)
        else:  # without its body this finds the execution, if there is one, but never starts one
            self._control(Cancel(stream.sid), now)

    def _send_resume(self, stream: Stream, now: float) -> None:
        self._move(stream)
        self._control(stream.resume_frame(self._epoch), now)
        if stream.given_up is not None:
            self._control(Cancel(stream.sid), now)

    def _move(self, stream: Stream) -> None:
        self._by_sid.pop(stream.sid, None)
        self._highest += 1
        stream.moved_to(self._highest)
        self._by_sid[self._highest] = stream

    def _control(self, frame: Frame, now: float) -> None:
        if self._wire is not None:
            self._wire.control(frame, now)

    # --- in ---

    def receive(self, message: bytes | str, now: float) -> None:
        """Take one message. If the server breaks the rules the connection is given up, not the requests."""
        if self._wire is None or self._wire.closing is not None:
            return
        self._wire.heard_at = now
        try:
            self._dispatch(self._wire.codec.decode(message), now)
        except CausewayError as error:
            self.last_error = error
            self._wire.close(close_for(error))

    def _dispatch(self, frame: Frame, now: float) -> None:
        if isinstance(frame, Data | End | Accept | Resumed):
            self._on_stream_frame(frame, now)
        elif isinstance(frame, Err):
            self._on_err(frame, now)
        elif isinstance(frame, Ping):
            self._control(Pong(frame.id), now)
        elif isinstance(frame, Pong) and frame.id == self._ping:
            self._measure(now - self._pinged_at)
        elif isinstance(frame, Welcome):
            self._on_welcome(frame, now)
        elif isinstance(frame, Goaway):
            self.draining, self.reconnect_after = True, frame.reconnect_after
        elif isinstance(frame, Offer):
            self._fleet.on_offer(frame, self._wake)

    def _on_stream_frame(self, frame: Data | End | Accept | Resumed, now: float) -> None:
        stream = self._stream(frame.sid)
        if stream is None:
            return
        try:
            if isinstance(frame, Data):
                stream.on_data(frame, now, self.limits.max_output)
            elif isinstance(frame, End):
                stream.on_end(frame)
                self._settle(stream, now)
            else:
                stream.accepted(frame.attach, frame.token)
        except Unrecoverable as error:
            self._give_up(stream, error, now)
            if isinstance(frame, End):
                self._forget(stream)

    def _on_err(self, frame: Err, now: float) -> None:
        error = error_of(frame)
        if frame.scope == "connection":
            return self.refused(error)
        stream = self._stream(frame.sid)
        if stream is None:
            return None
        if isinstance(error, SlowConsumer) and not frame.seq and stream.given_up is None:
            return self._pause(stream, now)
        try:
            stream.on_failure(frame, error)
        except Unrecoverable as broken:
            self._give_up(stream, broken, now)
            return self._forget(stream)
        return self._settle(stream, now) if frame.seq else self._forget(stream)

    def _pause(self, stream: Stream, now: float) -> None:
        """The server let go of a stream that was read too slowly; it goes on when there is room."""
        self._by_sid.pop(stream.sid, None)
        stream.lost(now)
        stream.paused = True
        if stream.drained:
            self._send_resume(stream, now)

    def _stream(self, sid: int) -> Stream | None:
        """None for a stream that is over here: its last frames were on their way."""
        if sid > self._highest:
            raise BadFrame("no such stream on this connection", param="sid")
        return self._by_sid.get(sid)

    def _settle(self, stream: Stream, now: float) -> None:
        """Acknowledge a numbered end, so that the server can forget the request."""
        self._control(stream.ack_frame(), now)
        self._forget(stream)

    def _give_up(self, stream: Stream, error: CausewayError, now: float) -> None:
        if stream.given_up is not None:
            return
        stream.finish(error)
        stream.given_up = now
        if stream.sid:
            self._control(Cancel(stream.sid), now)

    def _forget(self, stream: Stream) -> None:
        self._by_sid.pop(stream.sid, None)
        if stream in self._streams:
            self._streams.remove(stream)
        if stream in self._uploads:
            self._uploads.remove(stream)

    def _measure(self, sample: float) -> None:
        self.round_trip = sample if self.round_trip is None else self.round_trip + (sample - self.round_trip) / 4

    # --- out ---

    def next_message(self, now: float) -> bytes | str | None:
        """The next message to send, or None: control frames, then acknowledgements, then request pieces in turn."""
        if self._wire is None:
            return None
        frame = self._wire.pop_control() or self._next_ack(now) or self._fleet.next_state() or self._next_body()
        return None if frame is None else self._wire.codec.encode(frame)

    def _next_ack(self, now: float) -> Frame | None:
        for stream in self._by_sid.values():
            if stream.ack_at is not None and stream.ack_at <= now:
                return stream.ack_frame()
        return None

    def _next_body(self) -> Frame | None:
        while self._uploads:
            stream = self._uploads.popleft()
            frame = stream.body_frame() if stream.given_up is None and not stream.over else None
            if frame is not None:
                self._uploads.append(stream)
                return frame
        return None

    # --- time ---

    def next_deadline(self) -> float | None:
        times = [stream.patience(self.limits.resume_ttl) for stream in self._streams if stream.stranded]
        if self._wire is not None:
            times.append(self._wire.heard_at + self._rules.silent_after)
            times.append(self._greeting_or_ping_at())
            times += [stream.ack_at for stream in self._by_sid.values() if stream.ack_at is not None]
        return min(times, default=None)

    def tick(self, now: float) -> None:
        for stream in list(self._streams):
            if stream.stranded and now >= stream.patience(self.limits.resume_ttl):
                self._lose_patience(stream, now)
        if self._wire is None or self._wire.closing is not None:
            return
        if now >= self._wire.heard_at + self._rules.silent_after:
            self._wire.close(close_for(DeadlineExceeded("the cloud fell silent")))
        elif now >= self._greeting_or_ping_at():
            if not self._welcomed:
                self._wire.close(close_for(DeadlineExceeded("the cloud did not answer HELLO")))
            else:
                self._ping, self._pinged_at = self._ping + 1, now
                self._control(Ping(self._ping), now)

    def _greeting_or_ping_at(self) -> float:
        if self._welcomed:
            return self._pinged_at + self._rules.ping_every
        return self._connected_at + self._rules.welcome_within

    def _lose_patience(self, stream: Stream, now: float) -> None:
        if stream.given_up is not None:
            return self._forget(stream)
        why = "the connection to the cloud was lost" if stream.opened else "no connection to the cloud"
        if stream.received:
            stream.finish(Unrecoverable(f"{why} for too long", source="edge"))
        else:
            stream.finish(Unreachable(why, source="edge"))
        stream.given_up = now
        return None if stream.opened else self._forget(stream)


def _again(error: CausewayError) -> CausewayError:
    """The same error for another request: one exception object must not be raised in two tasks."""
    return from_code(error.code, error.message, param=error.param, source=error.source, retry_after=error.retry_after)
