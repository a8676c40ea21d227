"""The rules of one connection that carries many requests, without a socket, a loop or a clock.

A shell (the gateway's endpoint, the edge's cloud backend) owns the socket and does only this: give every message to
`receive`, send whatever `next_message` returns, call `tick` at `next_deadline`, close when `closing` says so, and run
or stop what the server's events name. Time is the argument `now` (any monotonic clock, seconds).

Here is the server's side: one `ServerSession` per connection over a shared `Registry`. The client's, `ClientSession`,
is in `shared/link.py` and outlives connections. PROTOCOL.md is the prose.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shared.connection import Close, Connection, close_for
from shared.errors import (
    BadFrame,
    Cancelled,
    CausewayError,
    DeadlineExceeded,
    RateLimited,
    SlowConsumer,
    Superseded,
    TooLarge,
    UnknownRequest,
    Unrecoverable,
)
from shared.executions import Attachment, Execution
from shared.frames import (
    PROTOCOL_VERSION,
    Accept,
    Ack,
    Body,
    Cancel,
    Codec,
    Data,
    End,
    Err,
    Fleet,
    FleetState,
    Frame,
    Goaway,
    Hello,
    Offer,
    Open,
    Ping,
    Pong,
    Resume,
    Resumed,
    Welcome,
)
from shared.link import ClientSession
from shared.offers import Sending
from shared.registry import Registry
from shared.schemas import ChatRequest
from shared.uploads import Uploads

__all__ = ["ClientSession", "Event", "Registry", "Reported", "ServerSession", "Start", "Stop"]


@dataclass(frozen=True, slots=True)
class Start:
    """Run this request once, feeding the execution."""

    execution: Execution
    request: ChatRequest


@dataclass(frozen=True, slots=True)
class Stop:
    """The client cancelled: stop what runs for this execution, which has ended already."""

    execution: Execution


@dataclass(frozen=True, slots=True)
class Reported:
    """An edge that follows a fleet says what it has of its policies; `session.offer` answers."""

    session: "ServerSession"
    tenant: str
    state: FleetState


Event = Start | Stop | Reported


class ServerSession:
    """The server's side of one connection of one tenant. `wake` is called when another task's doing gives it work."""

    def __init__(self, registry: Registry, tenant: str, codec: Codec, now: float, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.client = ""
        self._registry = registry
        self._rules = registry.rules
        self._tenant = tenant
        self._made_at = now
        self._greeted = False
        self._wire = Connection(codec, now, registry.rules.max_control)
        self._streams: dict[int, Attachment] = {}
        self._turns: deque[int] = deque()
        self._uploads = Uploads(registry.rules.max_uploads, registry.rules.body_within)
        self._highest = 0
        self._events: list[Event] = []
        self._follows = False
        """Whether the client asked for the fleet's policies."""
        self._offered = False
        self._offer: Sending | None = None
        self._last: Frame | None = None

    @property
    def closing(self) -> Close | None:
        return self._wire.closing

    @property
    def busy(self) -> bool:
        """Whether any request is on its way in or out."""
        return bool(self._streams or self._uploads)

    # --- in ---

    def receive(self, message: bytes | str, now: float) -> list[Event]:
        """Take one message. A breach of the wire's rules ends this connection and nothing else."""
        if self._wire.closing is None:
            self._wire.heard_at = now
            try:
                self._dispatch(self._wire.codec.decode(message), now)
            except CausewayError as error:
                self._refuse(error, now)
        events, self._events = self._events, []
        return events

    def _dispatch(self, frame: Frame, now: float) -> None:
        if isinstance(frame, Hello):
            self._on_hello(frame, now)
        elif not self._greeted:
            raise BadFrame("HELLO must come first", param="frame")
        elif isinstance(frame, Ping):
            self._wire.control(Pong(frame.id), now)
        elif isinstance(frame, Fleet):
            self._on_fleet(frame.state)
        elif isinstance(frame, Open | Body | Ack | Cancel | Resume):
            self._on_stream_frame(frame, now)

    def _on_hello(self, frame: Hello, now: float) -> None:
        if self._greeted:
            raise BadFrame("HELLO must come once", param="frame")
        self._greeted, self.client = True, frame.client
        self._wire.control(Welcome(PROTOCOL_VERSION, self._registry.epoch, self._rules.limits, self._rules.models), now)
        if frame.fleet is not None:
            self._follows = True
            self._on_fleet(frame.fleet)

    def _on_fleet(self, state: FleetState) -> None:
        if not self._follows:
            raise BadFrame("HELLO named no fleet", param="frame")
        self._events.append(Reported(self, self._tenant, state))

    def _on_stream_frame(self, frame: Open | Body | Ack | Cancel | Resume, now: float) -> None:
        """A breach here costs only the stream it names."""
        try:
            if isinstance(frame, Open | Resume):
                if frame.sid <= self._highest:
                    return self._on_reused(frame)
                self._highest = frame.sid
                return self._on_open(frame, now) if isinstance(frame, Open) else self._on_resume(frame, now)
            if frame.sid > self._highest:
                raise UnknownRequest("no such stream on this connection", param="sid")
            if isinstance(frame, Body):
                return self._on_body(frame, now)
            if isinstance(frame, Ack):
                return self._on_ack(frame, now)
            return self._on_cancel(frame, now)
        except CausewayError as error:
            self._drop(frame.sid, now)
            self._wire.control(Err.of(error, frame.sid), now)

    def _on_reused(self, frame: Open | Resume) -> None:
        """A repeat of what opened the stream is harmless; a different request under its number is not."""
        stream = self._streams.get(frame.sid)
        known = stream.execution.request_id if stream else self._uploads.request_id(frame.sid)
        if known not in (None, frame.rid):
            raise BadFrame("stream numbers must rise", param="sid")

    def _on_open(self, frame: Open, now: float) -> None:
        limits = self._rules.limits
        if not 0 < frame.length <= limits.max_prompt:
            raise TooLarge(f"request over {limits.max_prompt} bytes", param="messages")
        self._check_streams()
        known = self._registry.find(self._tenant, frame.rid, frame.sha256)
        if known is not None:
            return self._accept(known, frame.sid, frame.window, now)
        self._registry.check_room(self._tenant)
        return self._uploads.begin(frame, now)

    def _on_body(self, frame: Body, now: float) -> None:
        whole = self._uploads.add(frame)
        if whole is None:
            return
        opened, request = whole
        execution = self._registry.find(self._tenant, opened.rid, opened.sha256)
        if execution is None:
            execution = self._registry.create(self._tenant, opened.rid, opened.sha256)
            self._events.append(Start(execution, request))
        self._accept(execution, opened.sid, opened.window, now)

    def _accept(self, execution: Execution, sid: int, window: int, now: float) -> None:
        stream = self._attach(execution, sid, 0, window, now)
        self._wire.control(Accept(sid, stream.number, execution.tokens[0]), now)

    def _on_resume(self, frame: Resume, now: float) -> None:
        self._check_streams()
        if frame.epoch != self._registry.epoch:
            raise Unrecoverable("the server restarted since; its logs are gone", param="epoch")
        execution = self._registry.resumable(self._tenant, frame.rid, frame.token)
        if frame.last_seq > execution.last_seq:
            raise BadFrame("resume from beyond the end", param="last_seq")
        stream = self._attach(execution, frame.sid, frame.last_seq, frame.window, now)
        self._wire.control(Resumed(frame.sid, stream.number, frame.last_seq + 1, execution.tokens[0]), now)

    def _on_ack(self, frame: Ack, now: float) -> None:
        stream = self._streams.get(frame.sid)
        if stream is None or frame.attach != stream.number:
            return
        if frame.seq > stream.sent:
            raise BadFrame("acknowledged what was not sent", param="seq")
        execution = stream.execution
        execution.tokens = execution.tokens[:1]
        stream.limit = max(stream.limit, frame.seq + frame.window)
        execution.acknowledge(frame.seq, now)
        if execution.ended and frame.seq == execution.last_seq:
            self._forget(frame.sid)
            self._registry.retire(execution, now)

    def _on_cancel(self, frame: Cancel, now: float) -> None:
        if self._uploads.drop(frame.sid):
            raise Cancelled("cancelled")
        stream = self._streams.get(frame.sid)
        if stream is not None and not stream.execution.ended:
            stream.execution.cancel(now)
            self._events.append(Stop(stream.execution))

    def _check_streams(self) -> None:
        if len(self._streams) + len(self._uploads) >= self._rules.limits.max_streams:
            raise RateLimited(f"at most {self._rules.limits.max_streams} requests on one connection", retry_after=1.0)

    # --- streams ---

    def _attach(self, execution: Execution, sid: int, after: int, window: int, now: float) -> Attachment:
        stream = self._registry.attach(execution, self, sid, after, window, now)
        self._streams[sid] = stream
        self._turns.append(sid)
        return stream

    def _forget(self, sid: int) -> Attachment | None:
        if sid in self._streams:
            self._turns.remove(sid)
        return self._streams.pop(sid, None)

    def _drop(self, sid: int, now: float) -> None:
        """Let go of a stream; its execution goes on and can be resumed."""
        self._uploads.drop(sid)
        stream = self._forget(sid)
        if stream is not None:
            self._registry.detach(stream, now)

    def fenced(self, sid: int) -> None:
        """A newer attachment took the stream over: not one more byte of it here."""
        self._forget(sid)
        self._wire.control(Err.of(Superseded("a newer connection took this stream over"), sid), self._wire.heard_at)
        self.wake()

    # --- out ---

    def next_message(self, now: float) -> bytes | str | None:
        """The next message to send, or None. Control before data; streams in turn, those without credit skipped."""
        frame = self._wire.pop_control() or self._next_bulk(now)
        return None if frame is None else self._wire.codec.encode(frame)

    def _next_bulk(self, now: float) -> Frame | None:
        """Output and a policy on its way in turn, a frame each: neither waits for the end of the other."""
        self._last = (
            self._next_data(now) or self._next_offer()
            if isinstance(self._last, Offer)
            else self._next_offer() or self._next_data(now)
        )
        return self._last

    def _next_offer(self) -> Offer | None:
        if self._offer is None or self._wire.closing is not None:
            return None
        frame = self._offer.frame()
        if self._offer.over:
            self._offer = None
        return frame

    def _next_data(self, now: float) -> Data | End | Err | None:
        if self._wire.closing is not None:
            return None
        for _ in range(len(self._turns)):
            sid = self._turns[0]
            self._turns.rotate(-1)
            stream = self._streams[sid]
            due = stream.execution.flush_at
            if due is not None and due <= now:
                stream.execution.flush(now)
            frame = stream.execution.frame(stream.sent + 1, sid, stream.limit)
            if frame is not None:
                stream.sent += 1
                return frame
        return None

    # --- time ---

    def next_deadline(self) -> float:
        rules, wire = self._rules, self._wire
        times = [wire.heard_at + rules.idle_after if self._greeted else self._made_at + rules.hello_within]
        if wire.stuck_since is not None:
            times.append(wire.stuck_since + rules.stuck_after)
        times += self._uploads.deadlines()
        for stream in self._streams.values():
            if stream.waiting_since is not None:
                times.append(stream.waiting_since + rules.slow_after)
            if stream.execution.flush_at is not None:
                times.append(stream.execution.flush_at)
        return min(times)

    def tick(self, now: float) -> None:
        rules, wire = self._rules, self._wire
        if not self._greeted and now >= self._made_at + rules.hello_within:
            self._refuse(DeadlineExceeded(f"no HELLO within {rules.hello_within:g} s"), now)
        elif now >= wire.heard_at + rules.idle_after:
            self._refuse(DeadlineExceeded(f"nothing heard for {rules.idle_after:g} s"), now)
        elif wire.stuck_since is not None and now >= wire.stuck_since + rules.stuck_after:
            self._refuse(SlowConsumer("replies are not read"), now)
        for sid in self._uploads.late(now):
            self._end_stream(sid, DeadlineExceeded("the request did not arrive in time", param="body"), now)
        for sid, stream in list(self._streams.items()):
            if stream.waiting_since is not None and now >= stream.waiting_since + rules.slow_after:
                self._end_stream(sid, SlowConsumer(f"nothing acknowledged for {rules.slow_after:g} s"), now)
            elif stream.execution.flush_at is not None and now >= stream.execution.flush_at:
                stream.execution.flush(now)

    def _end_stream(self, sid: int, error: CausewayError, now: float) -> None:
        self._drop(sid, now)
        self._wire.control(Err.of(error, sid), now)

    # --- the fleet ---

    def offer(self, version: int, signed: bytes) -> None:
        """Send a policy to an edge that said `fleet`; it takes the place of another one on its way. Version 0, empty:
        there is nothing new, which is said once so that the edge knows that somebody listens."""
        if (not version and self._offered) or (self._offer is not None and self._offer.version == version):
            return
        self._offered, self._offer = True, Sending(version, signed)
        self.wake()

    # --- its end ---

    def goaway(self, reason: str, drain: float, reconnect_after: float, now: float) -> None:
        self._wire.control(Goaway(reason, drain, reconnect_after), now)

    def close(self, close: Close) -> None:
        self._wire.close(close)

    def _refuse(self, error: CausewayError, now: float) -> None:
        self._wire.control(Err.of(error, sid=0), now)
        self._wire.close(close_for(error))

    def lost(self, now: float) -> None:
        """The connection is gone. That cancels nothing: executions wait for their client to come back."""
        for sid in [*self._streams, *self._uploads.sids()]:
            self._drop(sid, now)
        self._wire.close(Close(1006, "lost"))
