"""What another server's refusal means here: its status and error object as one of our typed errors.

Its message is read, to tell a prompt that is too long from other bad input, but never passed on: servers quote prompts
and keys in theirs. Known shapes: OpenAI's `{"error": {...}}` (Causeway, vLLM, SGLang, llama-server), the bare object of
older vLLM and SGLang, and TGI's `{"error": "text", "error_type": "..."}`.
"""

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from shared.errors import (
    BY_CODE,
    BadRequest,
    CausewayError,
    ContextTooLong,
    DeadlineExceeded,
    Overloaded,
    RateLimited,
    TooLarge,
    UnknownModel,
    UpstreamFailed,
)

MAX_RETRY_AFTER = 3600.0

_CONTEXT_CODES = {"context_length_exceeded", "exceed_context_size_error"}
_CONTEXT = re.compile(r"context[ _](length|size|window)|max_model_len|`inputs` tokens", re.IGNORECASE)
_PARAM = re.compile(r"([a-z_]{1,40})(?:[.\[][a-z0-9_.\[\]]{0,60})?")
_STATUS_OF_TYPE = {"overloaded": 503, "validation": 422, "rate_limit_error": 429, "invalid_request_error": 400}
_KINDS: Mapping[int, tuple[type[CausewayError], str]] = {
    400: (BadRequest, "the upstream refuses this request"),
    401: (UpstreamFailed, "the upstream refuses this server's key"),
    403: (UpstreamFailed, "the upstream refuses this server's key"),
    408: (DeadlineExceeded, "the upstream ran out of time"),
    413: (TooLarge, "the request is too large for the upstream"),
    422: (BadRequest, "the upstream refuses this request"),
    429: (RateLimited, "the upstream limits the rate of requests"),
    503: (Overloaded, "the upstream is overloaded"),
    504: (DeadlineExceeded, "the upstream ran out of time"),
}


def refused(
    status: int, body: bytes, retry_after: str | None, *, fields: Mapping[str, Any], now: datetime | None = None
) -> CausewayError:
    """The error that a reply with this status, body and Retry-After header is. `fields` are those that were sent: only
    one of them is named as `param`."""
    try:
        said = _said(msgspec.json.decode(body))
    except (ValueError, RecursionError):  # UnicodeDecodeError and msgspec's are ValueErrors
        said = {}
    return _error(status, said, _seconds(retry_after, now or datetime.now(UTC)), fields)


def broken_off(event: Mapping[str, Any], fields: Mapping[str, Any]) -> CausewayError:
    """The error that an event of a stream tells of. `event` is its whole object."""
    said = _said(event)
    code = said.get("code")
    if type(code) is int and 400 <= code < 600:
        status = code
    elif isinstance(code, str) and code in BY_CODE:
        status = BY_CODE[code].status
    else:
        status = _STATUS_OF_TYPE.get(str(said.get("type")), 502)
    return _error(status, said, None, fields)


def _error(status: int, said: Mapping[str, Any], retry_after: float | None, fields: Mapping[str, Any]) -> CausewayError:
    code, kind, message = (str(said.get(name) or "") for name in ("code", "type", "message"))
    param = _param(said.get("param"), fields)
    if status in (400, 413, 422) and ({code, kind} & _CONTEXT_CODES or _CONTEXT.search(message)):
        return ContextTooLong("the prompt does not fit the upstream's context length", param="messages", source="cloud")
    if status == 404 and _is_about_a_model(code, kind, message):
        return UnknownModel("the upstream does not know this model", param="model", source="cloud")
    failed = f"the upstream {'redirects' if 300 <= status < 400 else 'failed'} with status {status}"
    cls, text = _KINDS.get(status, (UpstreamFailed, failed))
    if cls is BadRequest and param:
        text = f"the upstream refuses {param}"
    known = retry_after if retry_after is not None else _bounded(said.get("retry_after"))
    return cls(text, param=param if issubclass(cls, BadRequest) else None, source="cloud", retry_after=known)


def _said(value: Any) -> dict[str, Any]:
    """The error's own object, whatever shape it came in."""
    if not isinstance(value, dict):
        return {}
    said = value.get("error", value)
    if isinstance(said, str):
        return {"message": said, "type": value.get("error_type")}
    return said if isinstance(said, dict) else {}


def _is_about_a_model(code: str, kind: str, message: str) -> bool:
    return code == "model_not_found" or kind == "NotFoundError" or "model" in message.lower()


def _param(value: Any, fields: Mapping[str, Any]) -> str | None:
    match = _PARAM.fullmatch(value) if isinstance(value, str) else None
    return match.group(0) if match and match.group(1) in fields else None


def _seconds(header: str | None, now: datetime) -> float | None:
    """Retry-After is a number of seconds or a date."""
    if header is None:
        return None
    for read in (float, _until(now)):
        try:
            return _bounded(read(header.strip()))
        except (ValueError, TypeError, OverflowError):
            continue
    return None


def _until(now: datetime) -> Callable[[str], float]:
    def read(text: str) -> float:
        at = parsedate_to_datetime(text)
        return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - now).total_seconds()

    return read


def _bounded(value: Any) -> float | None:
    if type(value) not in (int, float) or math.isnan(value):
        return None
    return float(min(max(value, 0), MAX_RETRY_AFTER))
