"""The requests that are on their way in on one connection: pieces in order, hashed, within a time and a size."""

from dataclasses import dataclass, field

from shared.errors import BadFrame, BadRequest, Overloaded, PolicyDenied
from shared.frames import Body, Open, body_hash, decode_request
from shared.schemas import ChatRequest


@dataclass(frozen=True, slots=True)
class _Upload:
    open: Open
    until: float
    body: bytearray = field(default_factory=bytearray)


class Uploads:
    """By stream number. At most `most` bytes announced at once; each has `within` seconds to be whole."""

    def __init__(self, most: int, within: float) -> None:
        self._most, self._within = most, within
        self._running: dict[int, _Upload] = {}

    def __len__(self) -> int:
        return len(self._running)

    def sids(self) -> list[int]:
        return list(self._running)

    def request_id(self, sid: int) -> str | None:
        return self._running[sid].open.rid if sid in self._running else None

    def begin(self, frame: Open, now: float) -> None:
        """Raises Overloaded."""
        if sum(upload.open.length for upload in self._running.values()) + frame.length > self._most:
            raise Overloaded("too many request bytes on their way on this connection", retry_after=1.0)
        self._running[frame.sid] = _Upload(frame, now + self._within)

    def add(self, frame: Body) -> tuple[Open, ChatRequest] | None:
        """The request, once it is whole and what was announced. Raises BadFrame, BadRequest, PolicyDenied."""
        upload = self._running.get(frame.sid)
        if upload is None:  # refused, cancelled, or known already: the pieces were on their way
            return None
        have = len(upload.body)
        if frame.off + len(frame.data) <= have:
            return None
        if frame.off != have or have + len(frame.data) > upload.open.length:
            raise BadFrame("request piece out of place", param="off")
        upload.body.extend(frame.data)
        if len(upload.body) < upload.open.length:
            return None
        del self._running[frame.sid]
        return upload.open, _checked(upload.open, bytes(upload.body))

    def drop(self, sid: int) -> bool:
        """Whether there was one."""
        return self._running.pop(sid, None) is not None

    def late(self, now: float) -> list[int]:
        return [sid for sid, upload in self._running.items() if now >= upload.until]

    def deadlines(self) -> list[float]:
        return [upload.until for upload in self._running.values()]


def _checked(opened: Open, body: bytes) -> ChatRequest:
    if body_hash(body) != opened.sha256:
        raise BadRequest("the request does not match its hash", param="sha256")
    request = decode_request(body)
    if request.id != opened.rid:
        raise BadRequest("the request's id is not the one it was opened with", param="id")
    if request.label != "free":
        raise PolicyDenied(f"a request labelled {request.label} must not be sent", param="label")
    return request
