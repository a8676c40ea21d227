"""What the server keeps of one accepted request, whichever connection is there to read it.

An `Execution` is one run of one request: its whole output as numbered pieces, its one end, and who reads it. Pieces are
kept encoded, so that its memory is what it says. Nothing here does I/O or reads a clock.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import msgspec

from shared.errors import CausewayError, TooLarge
from shared.frames import Data, End, Err, Limits, output_bytes
from shared.schemas import Delta, ModelCard, Route, TokenLogprob, ToolPiece, TopLogprob

Outcome = Literal["running", "done", "error", "cancelled", "abandoned"]

PIECE_BYTES = 4 << 10
"""Of text in one DATA frame: six times this, JSON's worst escape, and the logprobs still fit a frame."""
CALL_BYTES = 256
"""What a piece of a call takes beside its arguments, at most."""
LOGPROB_BYTES = 24 << 10
PIECE_DELTAS = 64
NO_CHANCE = -9999.0
"""Stands for log(0), which JSON cannot say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the server permits and how long it waits; `limits` and `models` are what WELCOME says. Seconds, bytes."""

    limits: Limits = field(default_factory=Limits)
    models: tuple[ModelCard, ...] = ()
    hello_within: float = 5.0
    idle_after: float = 60.0
    body_within: float = 30.0
    slow_after: float = 30.0
    stuck_after: float = 10.0
    """How long a control frame may wait to be sent before the connection counts as not being read."""
    orphan_grace: float = 30.0
    coalesce: float = 0.040
    run_ahead: int = 16 << 10
    """How far an execution may produce beyond what its reader acknowledged, before it is asked to wait."""
    max_uploads: int = 4 << 20
    """Of request bodies still arriving on one connection."""
    max_control: int = 256
    max_per_tenant: int = 128
    max_executions: int = 1024


class _Piece(msgspec.Struct, frozen=True, array_like=True):
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolPiece, ...] = ()


class _Entry(NamedTuple):
    off: int
    total: int
    """Bytes of the log up to and including this entry."""
    blob: bytes


class Reader(Protocol):
    """The connection that an execution is attached to."""

    def wake(self) -> None: ...

    def fenced(self, sid: int) -> None: ...


@dataclass(slots=True)
class Attachment:
    """One connection's reading of one execution: how far it was sent, how far acknowledged, how far it may go."""

    execution: "Execution"
    reader: Reader
    sid: int
    number: int
    sent: int
    limit: int
    waiting_since: float | None = None
    """Since when something is unacknowledged without any progress."""


class Execution:
    """One run of one request. Ends exactly once: the first of END, an error, a cancel or abandonment wins."""

    def __init__(self, tenant: str, request_id: str, sha256: bytes, rules: Rules) -> None:
        self.tenant = tenant
        self.request_id = request_id
        self.sha256 = sha256
        self.outcome: Outcome = "running"
        self.attached: Attachment | None = None
        self.attaches = 0
        self.tokens: tuple[str, ...] = ()
        """What a RESUME may show: the newest, and the one before it until the newest is known to have arrived."""
        self.idle_since = 0.0
        """When it was last without a reader and the later of that and its end."""
        self.acked = 0
        self.on_room: Callable[[], None] = _nothing
        self._rules = rules
        self._log: list[_Entry] = []
        self._end: End | Err | None = None
        self._bytes = 0
        self._sha256 = hashlib.sha256()
        self._pending: list[Delta] = []
        self._pending_chars = 0
        self._pending_since = 0.0
        self._spoke = False
        self._route: Route | None = None

    # --- what the engine's side tells ---

    def produce(self, delta: Delta, now: float) -> None:
        """Take a piece of the answer. Ignored once the execution has ended."""
        if self._end is not None:
            return
        self._route = delta.route or self._route
        if delta.text or delta.tokens or delta.logprobs or delta.tool_calls:
            if not self._pending:
                self._pending_since = now
            self._pending.append(delta)
            self._pending_chars += len(delta.text) + sum(len(call.arguments) for call in delta.tool_calls)
        if delta.finish_reason is not None:
            self._finish_with(delta, now)
        elif not self._spoke or self._pending_chars >= PIECE_BYTES or len(self._pending) >= PIECE_DELTAS:
            self.flush(now)
        if self.attached is not None:
            self.attached.reader.wake()

    def fail(self, error: CausewayError, now: float, outcome: Outcome = "error") -> None:
        """End with an error, after everything produced so far. Ignored if it ended already."""
        if self._end is None:
            self.flush(now)
        if self._end is None:
            self._close(Err.of(error, sid=1, seq=len(self._log) + 1), outcome, now)

    def cancel(self, now: float) -> None:
        if self._end is None:
            self._finish_with(Delta(finish_reason="cancelled"), now)

    def flush(self, now: float) -> None:
        """Number what is pending. From here on these bytes are fixed."""
        pending, self._pending, self._pending_chars = self._pending, [], 0
        if not pending or self._end is not None:
            return
        text = "".join(delta.text for delta in pending)
        logprobs = tuple(_sendable(entry) for delta in pending for entry in delta.logprobs)
        calls = tuple(piece for delta in pending for piece in delta.tool_calls)
        self._spoke = self._spoke or bool(text or logprobs or calls)
        try:
            for piece in _pieces(text, sum(delta.tokens for delta in pending), logprobs, calls):
                self._append(piece)
        except TooLarge as error:
            self._close(Err.of(error, sid=1, seq=len(self._log) + 1), "error", now)
        self._note_waiting(now)

    @property
    def flush_at(self) -> float | None:
        return self._pending_since + self._rules.coalesce if self._pending else None

    @property
    def room(self) -> bool:
        """Whether to produce on: false while the reader is too far behind."""
        return self._unacked < self._rules.run_ahead

    # --- what a connection asks ---

    @property
    def ended(self) -> bool:
        return self._end is not None

    @property
    def last_seq(self) -> int:
        return len(self._log) + (self._end is not None)

    def frame(self, seq: int, sid: int, limit: int) -> Data | End | Err | None:
        """The frame numbered `seq`, if it exists and, being data, is within the reader's credit."""
        if seq <= len(self._log):
            if seq > limit:
                return None
            entry = self._log[seq - 1]
            piece = _UNPACK.decode(entry.blob)
            return Data(sid, seq, entry.off, piece.text, piece.tokens, piece.logprobs, piece.tool_calls)
        if self._end is None or seq > self.last_seq:
            return None
        return msgspec.structs.replace(self._end, sid=sid)

    def acknowledge(self, seq: int, now: float) -> None:
        if seq > self.acked:
            self.acked = seq
            if self.attached is not None:
                self.attached.waiting_since = now if self.last_seq > seq else None
            self.on_room()

    # --- inside ---

    @property
    def _unacked(self) -> int:
        if not self._log:
            return 0
        seen = min(self.acked, len(self._log))
        return self._log[-1].total - (self._log[seen - 1].total if seen else 0)

    def _append(self, piece: _Piece) -> None:
        blob, output = _PACK.encode(piece), output_bytes(piece.text, piece.tool_calls)
        total = (self._log[-1].total if self._log else 0) + len(blob)
        limit = self._rules.limits.max_output
        if self._bytes + len(output) > limit or total > 8 * limit:
            raise TooLarge(f"answer over {limit} bytes")
        self._log.append(_Entry(self._bytes, total, blob))
        self._bytes += len(output)
        self._sha256.update(output)

    def _finish_with(self, last: Delta, now: float) -> None:
        self.flush(now)
        if self._end is not None or last.finish_reason is None:
            return
        seq, digest = len(self._log) + 1, self._sha256.digest()
        end = End(1, seq, last.finish_reason, last.usage, self._bytes, digest, self._route, last.stop)
        self._close(end, "cancelled" if last.finish_reason == "cancelled" else "done", now)

    def _close(self, end: End | Err, outcome: Outcome, now: float) -> None:
        self._end, self.outcome = end, outcome
        self._pending = []
        self.idle_since = now
        self._note_waiting(now)
        self.on_room()
        if self.attached is not None:
            self.attached.reader.wake()

    def _note_waiting(self, now: float) -> None:
        if self.attached is not None and self.attached.waiting_since is None:
            self.attached.waiting_since = now


_PACK = msgspec.msgpack.Encoder()
_UNPACK = msgspec.msgpack.Decoder(_Piece)


def _nothing() -> None:
    return None


def _sendable(entry: TokenLogprob) -> TokenLogprob:
    """The same with infinities replaced: not every encoding can carry them."""
    if math.isfinite(entry.logprob) and all(math.isfinite(rival.logprob) for rival in entry.top):
        return entry
    top = tuple(TopLogprob(rival.token, _finite(rival.logprob), rival.bytes) for rival in entry.top)
    return TokenLogprob(entry.token, _finite(entry.logprob), entry.bytes, top)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else NO_CHANCE


def _pieces(text: str, tokens: int, logprobs: tuple[TokenLogprob, ...], calls: tuple[ToolPiece, ...]) -> list[_Piece]:
    """Cut into frame-sized pieces; the first one carries the token count. Calls come after the text."""
    texts, groups = _cut_text(text), _cut_logprobs(logprobs)
    count = max(len(texts), len(groups), 0 if calls else 1)
    texts += [""] * (count - len(texts))
    groups += [()] * (count - len(groups))
    pieces = [_Piece(texts[i], tokens if i == 0 else 0, groups[i]) for i in range(count)]
    said = [_Piece("", 0, (), group) for group in _cut_calls(calls)]
    if said and not pieces:
        said[0] = _Piece("", tokens, (), said[0].tool_calls)
    return pieces + said


def _cut_calls(calls: tuple[ToolPiece, ...]) -> list[tuple[ToolPiece, ...]]:
    """Pieces of one call after another are joined; arguments too long for a frame are cut."""
    groups: list[list[ToolPiece]] = []
    size = PIECE_BYTES
    for call in calls:
        texts = _cut_text(call.arguments) or [""]
        for at, text in enumerate(texts):
            piece = call if len(texts) == 1 else ToolPiece(call.index, text, *((call.id, call.name) if at == 0 else ()))
            cost = len(text.encode()) + CALL_BYTES
            if size + cost > PIECE_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(piece)
            size += cost
    return [tuple(group) for group in groups]


def _cut_text(text: str) -> list[str]:
    data, cuts, start = text.encode(), [], 0
    while start < len(data):
        end = min(start + PIECE_BYTES, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:  # never inside a character
            end -= 1
        cuts.append(data[start:end].decode())
        start = end
    return cuts


def _cut_logprobs(logprobs: tuple[TokenLogprob, ...]) -> list[tuple[TokenLogprob, ...]]:
    groups: list[tuple[TokenLogprob, ...]] = []
    group: list[TokenLogprob] = []
    size = 0
    for entry in logprobs:
        cost = len(msgspec.json.encode(entry))
        if cost > LOGPROB_BYTES:
            raise TooLarge("a token's log probabilities do not fit a frame", param="top_logprobs")
        if group and size + cost > LOGPROB_BYTES:
            groups.append(tuple(group))
            group, size = [], 0
        group.append(entry)
        size += cost
    return [*groups, tuple(group)] if group else groups
