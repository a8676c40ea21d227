"""Deltas and errors as OpenAI's JSON: chunks of a stream, a whole response, the error object, the list of models."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from shared.errors import Cancelled, CausewayError, UpstreamFailed
from shared.openai import Call, Kind
from shared.schemas import Delta, FinishReason, ModelCard, Priority, Route, TokenLogprob, ToolPiece, Usage

NO_LOGPROB = -9999.0
"""What OpenAI says for a probability of zero; JSON has no infinity."""

_TIERS = {"interactive": "default", "batch": "flex"}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_object(error: CausewayError) -> dict[str, Any]:
    """OpenAI's error object, plus who failed (`source`) and whether trying again can help (`retryable`)."""
    kind = "server_error" if error.status >= 500 else _TYPES.get(error.status, "invalid_request_error")
    body: dict[str, Any] = {
        "message": error.message,
        "type": kind,
        "param": error.param,
        "code": error.code,
        "source": error.source,
        "retryable": error.retryable,
    }
    if error.retry_after is not None:
        body["retry_after"] = error.retry_after
    return {"error": body}


def error_body(error: CausewayError) -> bytes:
    return msgspec.json.encode(error_object(error))


def model_list(cards: Iterable[ModelCard], created: int) -> bytes:
    return msgspec.json.encode({"object": "list", "data": [_model(card, created) for card in cards]})


def model_object(card: ModelCard, created: int) -> bytes:
    return msgspec.json.encode(_model(card, created))


class Chunks:
    """One streamed reply: deltas in, server-sent events out.

    Each choice's first chunk says the role, its last one has `finish_reason` and `causeway` (route, reason,
    failovers), as has one whose text is a mark. `end` gives the usage chunk if it was asked for, then `[DONE]`.
    """

    def __init__(self, call: Call, *, reply_id: str, created: int) -> None:
        self._chat = call.kind == "chat"
        self._include_usage = call.include_usage
        self._head: dict[str, Any] = {
            "id": reply_id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": created,
            "model": call.model,
            "service_tier": service_tier(call.requests[0].priority),
        }
        self._tail: dict[str, Any] = {"usage": None} if call.include_usage else {}
        self.route: Route | None = None
        self._offsets = [0] * len(call.requests)
        self._opened = [False] * len(call.requests)
        self._around: list[tuple[bytes, bytes] | None] = [None] * len(call.requests)
        self._usages: list[Usage | None] = [None] * len(call.requests)
        self._routes: list[Route | None] = [None] * len(call.requests)

    def push(self, index: int, delta: Delta) -> bytes:
        """The events this delta makes: none, one or, at the ends of a choice, two."""
        events = b""
        if self._chat and not self._opened[index]:
            events = self._chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})
        self._opened[index] = True
        self._routes[index] = self.route = delta.route or self._routes[index]
        if delta.logprobs or delta.marks:
            events += self._chunk(index, self._piece(index, delta), **marked(delta))
        elif delta.text:
            before, after = self._around_text(index)
            events += before + msgspec.json.encode(delta.text) + after
        if delta.tool_calls:
            called = [_tool_piece(piece) for piece in delta.tool_calls]
            events += self._chunk(index, {"delta": {"tool_calls": called}, "logprobs": None})
        if delta.finish_reason is not None:
            self._usages[index] = delta.usage or Usage(prompt_tokens=0, completion_tokens=0)
            events += self._finish(index, finish_reason(delta))
        return events

    def end(self) -> bytes:
        """Raises UpstreamFailed if a choice has not had its last delta."""
        usage = _total(self._usages)
        events = _event({**self._head, "choices": [], "usage": usage}) if self._include_usage else b""
        return events + b"data: [DONE]\n\n"

    def fail(self, error: CausewayError) -> bytes:
        """The explicit end of a stream that failed after its first token: no `[DONE]` follows."""
        return _event(error_object(error))

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and behind the text of a chunk that has nothing else: nearly all of them are such."""
        if (around := self._around[index]) is None:
            # No other text in it is empty behind this one.
            before, _, after = self._chunk(index, self._piece(index, Delta())).rpartition(b'""')
            around = self._around[index] = before, after
        return around

    def _piece(self, index: int, delta: Delta) -> dict[str, Any]:
        if self._chat:
            return {"delta": {"content": delta.text}, "logprobs": _chat_logprobs(delta.logprobs)}
        logprobs = _text_logprobs(delta.logprobs, self._offsets[index])
        self._offsets[index] += sum(len(token.token) for token in delta.logprobs)
        return {"text": delta.text, "logprobs": logprobs}

    def _finish(self, index: int, reason: str | None) -> bytes:
        piece: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        extra = {"causeway": causeway_object(route)} if (route := self._routes[index]) else {}
        return self._chunk(index, {**piece, "logprobs": None}, reason, **extra)

    def _chunk(self, index: int, piece: dict[str, Any], reason: str | None = None, **extra: Any) -> bytes:
        choice = {"index": index, **piece, "finish_reason": reason}
        return _event({**self._head, "choices": [choice], **self._tail, **extra})


class Whole:
    """One reply in one piece: deltas in, the response body out."""

    def __init__(self, call: Call, *, reply_id: str, created: int) -> None:
        self._kind: Kind = call.kind
        self._head: dict[str, Any] = {
            "id": reply_id,
            "object": "chat.completion" if call.kind == "chat" else "text_completion",
            "created": created,
            "model": call.model,
            "service_tier": service_tier(call.requests[0].priority),
        }
        self._wants_logprobs = call.requests[0].sampling.logprobs is not None
        self._texts: list[list[str]] = [[] for _ in call.requests]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in call.requests]
        self._calls: list[dict[int, dict[str, Any]]] = [{} for _ in call.requests]
        self._reasons: list[FinishReason | None] = [None] * len(call.requests)
        self._usages: list[Usage | None] = [None] * len(call.requests)
        self.route: Route | None = None

    def push(self, index: int, delta: Delta) -> bytes:
        self._texts[index].append(delta.text)
        self._logprobs[index].extend(delta.logprobs)
        for piece in delta.tool_calls:
            _add(self._calls[index], piece)
        self.route = delta.route or self.route
        if delta.finish_reason is not None:
            self._reasons[index] = finish_reason(delta)
            self._usages[index] = delta.usage or Usage(prompt_tokens=0, completion_tokens=0)
        return b""

    def end(self) -> bytes:
        """Raises UpstreamFailed if a choice has not had its last delta."""
        usage = _total(self._usages)
        extra = {"causeway": causeway_object(self.route)} if self.route else {}
        choices = [self._choice(index) for index in range(len(self._texts))]
        return msgspec.json.encode({**self._head, "choices": choices, "usage": usage, **extra})

    def fail(self, error: CausewayError) -> bytes:
        return error_body(error)

    def _choice(self, index: int) -> dict[str, Any]:
        text, logprobs = "".join(self._texts[index]), self._logprobs[index]
        choice: dict[str, Any] = {"index": index, "finish_reason": self._reasons[index]}
        if self._kind == "chat":
            shown = _chat_logprobs(logprobs) if self._wants_logprobs else None
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls := [*self._calls[index].values()]:
                message |= {"content": text or None, "tool_calls": calls}
            return {**choice, "message": message, "logprobs": shown}
        return {**choice, "text": text, "logprobs": _text_logprobs(logprobs, 0) if self._wants_logprobs else None}


def _tool_piece(piece: ToolPiece) -> dict[str, Any]:
    if piece.id is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name or "", "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


def _add(calls: dict[int, dict[str, Any]], piece: ToolPiece) -> None:
    """Put a piece to the call that it is of."""
    function = {"name": piece.name or "", "arguments": ""}
    call = calls.setdefault(piece.index, {"id": piece.id or "", "type": "function", "function": function})
    call["function"]["arguments"] += piece.arguments


def finish_reason(delta: Delta) -> FinishReason | None:
    """OpenAI knows no cancelled answer: to its clients that is an error. Raises Cancelled."""
    if delta.finish_reason == "cancelled":
        raise Cancelled("the request was cancelled while it was answered")
    return delta.finish_reason


def service_tier(priority: Priority) -> str:
    return _TIERS[priority]


def causeway_object(route: Route) -> dict[str, Any]:
    said: dict[str, Any] = {"route": route.target, "reason": route.reason, "failovers": route.failovers}
    said["model"] = route.model
    if route.cached:
        said["cache"] = route.cached.use
    if above := route.switched:
        said["switched"] = {"from": above.target, "model": above.model, "starts_at": above.starts_at}
        said["switched"]["usage"] = usage_object(above.usage)
    return said


def marked(delta: Delta) -> dict[str, Any]:
    """What stands beside the text of a mark: who answers from there on."""
    return {"causeway": causeway_object(delta.route)} if delta.marks and delta.route else {}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _total(usages: Sequence[Usage | None]) -> dict[str, Any]:
    """OpenAI counts the prompt once, however many choices it was asked for."""
    known = [usage for usage in usages if usage is not None]
    if len(known) < len(usages):
        raise UpstreamFailed("the answer ended before its last token")
    completion = sum(usage.completion_tokens for usage in known)
    return usage_object(msgspec.structs.replace(known[0], completion_tokens=completion))


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not tokens:
        return None
    return {"content": [token_logprob(token) for token in tokens], "refusal": None}


def _text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
    """The legacy form: parallel lists. `text_offset` counts characters of the answer."""
    if not tokens:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [{top.token: finite(top.logprob) for top in token.top} for token in tokens],
        "text_offset": offsets,
    }


def token_logprob(token: TokenLogprob) -> dict[str, Any]:
    """One token beside those that could have stood there, as every surface writes it."""
    tops = [{"token": top.token, "logprob": finite(top.logprob), "bytes": top.bytes} for top in token.top]
    return {"token": token.token, "logprob": finite(token.logprob), "bytes": token.bytes, "top_logprobs": tops}


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else NO_LOGPROB


def _model(card: ModelCard, created: int) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": created,
        "owned_by": card.owned_by,
        "context_length": card.context_length,
    }
