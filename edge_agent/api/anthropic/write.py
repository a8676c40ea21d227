"""Answers and errors as Anthropic's JSON: the events of a stream, a whole message, the error object."""

from typing import Any

import msgspec

from edge_agent.api.gathered import Gathered
from shared.errors import CausewayError
from shared.replies import causeway_object, marked
from shared.schemas import Delta, FinishReason, Route, ToolPiece

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_REASONS: dict[FinishReason, str] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def error_object(error: CausewayError) -> dict[str, Any]:
    """Anthropic's error object, plus the code, the field, who failed and whether trying again can help."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    detail = {"type": kind, "message": error.message, "code": error.code, "param": error.param}
    return {"type": "error", "error": {**detail, "source": error.source, "retryable": error.retryable}}


def error_body(error: CausewayError) -> bytes:
    return msgspec.json.encode(error_object(error))


class WholeMessage:
    """One reply in one piece."""

    def __init__(self, reply_id: str, model: str) -> None:
        self._head = _head(reply_id, model)
        self._gathered = Gathered()
        self.route: Route | None = None

    def push(self, _: int, delta: Delta) -> bytes:
        self._gathered.add(delta)
        self.route = self._gathered.route
        return b""

    def end(self) -> bytes:
        gathered = self._gathered
        content: list[dict[str, Any]] = [{"type": "text", "text": gathered.text}] if gathered.text else []
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": call.object()}
            for call in gathered.whole_calls
        ]
        body = {**self._head, "content": content, **_ending(gathered), "usage": _usage(gathered)}
        return msgspec.json.encode(body | _causeway(self.route))

    def fail(self, error: CausewayError) -> bytes:
        return error_body(error)


class MessageEvents:
    """One streamed reply. Text, each call and what follows a mark are blocks of their own, one after the other."""

    def __init__(self, reply_id: str, model: str) -> None:
        self._head = _head(reply_id, model)
        self._gathered = Gathered()
        self._begun = False
        self._blocks = 0
        self._open: str | None = None
        """What the last block is of: `text`, or a call's index."""
        self.route: Route | None = None

    def push(self, _: int, delta: Delta) -> bytes:
        self._gathered.add(delta)
        self.route = self._gathered.route
        events = b"" if self._begun else self._begin()
        if delta.text:
            if self._open != "text" or delta.marks:
                events += self._start("text", {"type": "text", "text": ""})
            events += self._delta({"type": "text_delta", "text": delta.text}, **marked(delta))
        return events + b"".join(self._called(piece) for piece in delta.tool_calls)

    def end(self) -> bytes:
        gathered = self._gathered
        last = {"delta": _ending(gathered), "usage": _usage(gathered), **_causeway(self.route)}
        return self._stop() + _event("message_delta", last) + _event("message_stop", {})

    def fail(self, error: CausewayError) -> bytes:
        return _event("error", error_object(error))

    def _begin(self) -> bytes:
        """The prompt's tokens are known at the end only."""
        self._begun = True
        unknown = {"input_tokens": 0, "output_tokens": 0}
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": unknown}
        return _event("message_start", {"message": {**self._head, **nothing}}) + _event("ping", {})

    def _called(self, piece: ToolPiece) -> bytes:
        events = b""
        if self._open != str(piece.index):
            call = self._gathered.calls[piece.index]
            events = self._start(str(piece.index), {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        if piece.arguments:
            events += self._delta({"type": "input_json_delta", "partial_json": piece.arguments})
        return events

    def _start(self, of: str, block: dict[str, Any]) -> bytes:
        events = self._stop()
        self._open = of
        self._blocks += 1
        return events + _event("content_block_start", {"index": self._blocks - 1, "content_block": block})

    def _delta(self, delta: dict[str, Any], **beside: Any) -> bytes:
        return _event("content_block_delta", {"index": self._blocks - 1, "delta": delta, **beside})

    def _stop(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", {"index": self._blocks - 1})


def _event(kind: str, value: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode({"type": kind} | value) + b"\n\n"


def _head(reply_id: str, model: str) -> dict[str, Any]:
    return {"id": reply_id, "type": "message", "role": "assistant", "model": model}


def _ending(gathered: Gathered) -> dict[str, Any]:
    stop = gathered.last.stop
    reason = "stop_sequence" if stop is not None and gathered.reason == "stop" else _REASONS[gathered.reason]
    return {"stop_reason": reason, "stop_sequence": stop}


def _usage(gathered: Gathered) -> dict[str, Any]:
    """Anthropic counts the tokens of a prompt that came from a cache apart."""
    usage = gathered.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "service_tier": "standard",
    }


def _causeway(route: Route | None) -> dict[str, Any]:
    return {"causeway": causeway_object(route)} if route else {}
