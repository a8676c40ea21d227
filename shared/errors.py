"""Every way a request can fail, as one tree of typed errors.

    CausewayError
    ├── BadRequest              400  the caller's input; `param` names the field
    │   ├── UnsupportedParameter 400 it would change the answer, and is not implemented
    │   ├── UnknownModel        404
    │   ├── ContextTooLong      400
    │   ├── TooLarge            413
    │   ├── UnsupportedMedia    415
    │   └── Quarantined         400  this very request was running when the model crashed, twice
    ├── Unauthorized            401
    ├── Forbidden               403  a good key for the wrong thing, or a foreign Host or Origin
    ├── NotFound                404  no such path
    ├── MethodNotAllowed        405
    ├── PolicyDenied            403  the administrator's policy permits no target
    ├── RequestConflict         409  this request id was used with another body
    ├── StaleDraft              409  a draft for a length that the sequence does not have
    ├── RateLimited             429  retryable
    ├── Overloaded              503  retryable; queue full or draining
    ├── Unreachable             502  retryable; no connection to the cloud
    ├── UpstreamFailed          502  retryable; the other side broke
    ├── DeadlineExceeded        504  retryable
    ├── NotCached               504  the caller wanted it from the cache or not at all
    ├── Cancelled               499
    ├── Unrecoverable           502  the stream cannot be continued: its log is gone
    ├── UnknownRequest          404  no such request, or not yours
    ├── Superseded              409  a newer connection took this stream over
    ├── SlowConsumer            408  nothing was read for too long
    ├── ProtocolError           400  a peer broke the wire's rules
    │   ├── BadFrame            400
    │   └── UnsupportedVersion  400
    └── Internal                500  a fault of ours

A class fixes `code`, `status` and `retryable`; an instance adds the message, the field (`param`), who failed
(`source`: edge or cloud) and, where known, when to come back (`retry_after`, seconds).
"""

from typing import ClassVar, Literal, Self

Source = Literal["edge", "cloud"]
MAX_SHORT_CHARS = 120


class CausewayError(Exception):
    """Base of all typed errors. `str(error)` is safe to show: it never holds prompt text or a secret."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        source: Source | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.source = source
        self.retry_after = retry_after

    def at(self, source: Source) -> Self:
        """Say who failed, unless that is known already."""
        self.source = self.source or source
        return self

    def in_short(self, failed: Source) -> str:
        """That this side failed and how, fit for a reply header."""
        return f"{failed} {self.code}: {self.message}".encode("ascii", "replace").decode()[:MAX_SHORT_CHARS]


class BadRequest(CausewayError):
    code, status = "bad_request", 400


class UnsupportedParameter(BadRequest):
    """A field that is defined and that would change the answer, but is not implemented here."""

    code = "unsupported_parameter"


class UnknownModel(BadRequest):
    code, status = "model_not_found", 404


class ContextTooLong(BadRequest):
    code, status = "context_length_exceeded", 400


class TooLarge(BadRequest):
    code, status = "too_large", 413


class UnsupportedMedia(BadRequest):
    code, status = "unsupported_media_type", 415


class Quarantined(BadRequest):
    code = "quarantined"


class Unauthorized(CausewayError):
    code, status = "unauthorized", 401


class Forbidden(CausewayError):
    code, status = "forbidden", 403


class NotFound(CausewayError):
    code, status = "not_found", 404


class MethodNotAllowed(CausewayError):
    code, status = "method_not_allowed", 405


class PolicyDenied(CausewayError):
    code, status = "policy_denied", 403


class RequestConflict(CausewayError):
    code, status = "request_conflict", 409


class StaleDraft(CausewayError):
    code, status = "stale_draft", 409


class RateLimited(CausewayError):
    code, status, retryable = "rate_limited", 429, True


class Overloaded(CausewayError):
    code, status, retryable = "overloaded", 503, True


class Unreachable(CausewayError):
    code, status, retryable = "unreachable", 502, True


class UpstreamFailed(CausewayError):
    code, status, retryable = "upstream_failed", 502, True


class DeadlineExceeded(CausewayError):
    code, status, retryable = "deadline_exceeded", 504, True


class NotCached(CausewayError):
    code, status = "not_cached", 504


class Cancelled(CausewayError):
    code, status = "cancelled", 499


class Unrecoverable(CausewayError):
    code, status = "unrecoverable", 502


class UnknownRequest(CausewayError):
    code, status = "unknown_request", 404


class Superseded(CausewayError):
    code, status = "superseded", 409


class SlowConsumer(CausewayError):
    code, status = "slow_consumer", 408


class ProtocolError(CausewayError):
    code, status = "protocol_error", 400


class BadFrame(ProtocolError):
    code, status = "bad_frame", 400


class UnsupportedVersion(ProtocolError):
    code, status = "unsupported_version", 400


class Internal(CausewayError):
    code, status = "internal", 500


def _subclasses(cls: type[CausewayError]) -> list[type[CausewayError]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]


BY_CODE: dict[str, type[CausewayError]] = {cls.code: cls for cls in _subclasses(CausewayError)}
"""The only table between an error's code on the wire and its class here."""


def from_code(
    code: str,
    message: str,
    *,
    param: str | None = None,
    source: Source | None = None,
    retry_after: float | None = None,
) -> CausewayError:
    """Rebuild an error that the other end sent; a code this version does not know becomes UpstreamFailed."""
    cls = BY_CODE.get(code, UpstreamFailed)
    return cls(message, param=param, source=source, retry_after=retry_after)
