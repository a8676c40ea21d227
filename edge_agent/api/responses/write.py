"""Answers as OpenAI's response objects, and as the events that build one up."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from edge_agent.api.gathered import Called, Gathered
from edge_agent.api.responses.read import ResponsesBody, ResponsesCall
from shared.errors import CausewayError
from shared.replies import causeway_object, error_body, marked, service_tier, token_logprob
from shared.schemas import Delta, Route, ToolPiece, Usage

Keep = Callable[[dict[str, Any], Gathered], None]
"""Takes a finished response."""


class Events:
    """One response, event by event; each is an object with its `type` and its number. `keep` gets the finished one.

    Text, each call and what follows a mark are items of their own, one after the other. `clock` gives seconds since
    1970.
    """

    def __init__(self, call: ResponsesCall, *, keep: Keep, clock: Callable[[], float]) -> None:
        self.gathered = Gathered()
        self._id = call.request.id.removeprefix("req_")
        self._call = call
        self._keep = keep
        self._clock = clock
        self._created = int(clock())
        self._number = -1
        self._items: list[dict[str, Any]] = []
        """Those that are done, and at the end the open one."""
        self._open: str | None = None
        """What the last item is of: `text`, or a call's index."""
        self._logprobs: list[dict[str, Any]] = []

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        self.gathered.add(delta)
        events = self._begin() if self._number < 0 else []
        if delta.text or delta.logprobs:
            if self._open != "text" or delta.marks:
                events += self._start_text("incomplete" if delta.marks else "completed")
            events.append(self._text(delta))
        for piece in delta.tool_calls:
            events += self._called(piece)
        return events

    def end(self) -> list[dict[str, Any]]:
        """Raises UpstreamFailed if the answer has not had its last delta."""
        cut = self.gathered.reason == "length"
        events = [] if self._items else self._start_text()
        events += self._stop("incomplete" if cut else "completed")
        body = self._body("incomplete" if cut else "completed", self.gathered.usage)
        self._keep(body, self.gathered)
        return [*events, self._event(f"response.{body['status']}", response=body)]

    def fail(self, error: CausewayError) -> list[dict[str, Any]]:
        events = self._begin() if self._number < 0 else []
        return [*events, self._event("response.failed", response=self._body("failed", None, error))]

    def _begin(self) -> list[dict[str, Any]]:
        body = self._body("in_progress", None)
        return [self._event("response.created", response=body), self._event("response.in_progress", response=body)]

    def _start_text(self, before: str = "completed") -> list[dict[str, Any]]:
        """`before` is what becomes of the item that is open."""
        events = self._stop(before)
        self._open, self._logprobs = "text", []
        item = {"id": f"msg_{self._id}_{len(self._items)}", "type": "message", "role": "assistant"}
        self._items.append({**item, "status": "in_progress", "content": []})
        return [
            *events,
            self._item_event("response.output_item.added", item={**self._items[-1]}),
            self._part_event("response.content_part.added", part=_part("", [])),
        ]

    def _text(self, delta: Delta) -> dict[str, Any]:
        logprobs = [token_logprob(token) for token in delta.logprobs]
        self._logprobs += logprobs
        self._items[-1].setdefault("texts", []).append(delta.text)
        return self._part_event("response.output_text.delta", delta=delta.text, logprobs=logprobs, **marked(delta))

    def _called(self, piece: ToolPiece) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if self._open != str(piece.index):
            events = self._stop("completed")
            self._open = str(piece.index)
            self._items.append(_call_item(f"fc_{self._id}_{len(self._items)}", self._call_of(piece), "in_progress"))
            events.append(self._item_event("response.output_item.added", item={**self._items[-1], "arguments": ""}))
        if piece.arguments:
            events.append(self._about("response.function_call_arguments.delta", delta=piece.arguments))
        return events

    def _call_of(self, piece: ToolPiece) -> Called:
        return self.gathered.calls[piece.index]

    def _stop(self, status: str) -> list[dict[str, Any]]:
        """Close the open item."""
        if self._open is None:
            return []
        item = self._items[-1]
        if self._open == "text":
            text = "".join(item.pop("texts", []))
            item |= {"status": status, "content": [_part(text, self._logprobs)]}
            done = [
                self._part_event("response.output_text.done", text=text, logprobs=self._logprobs),
                self._part_event("response.content_part.done", part=item["content"][0]),
            ]
        else:
            item |= {"status": status, "arguments": self.gathered.calls[int(self._open)].arguments}
            done = [self._about("response.function_call_arguments.done", arguments=item["arguments"])]
        self._open = None
        return [*done, self._item_event("response.output_item.done", item=item)]

    def _body(self, status: str, usage: Usage | None, error: CausewayError | None = None) -> dict[str, Any]:
        return response_object(
            self._call, f"resp_{self._id}", self._created, status,
            output=[item for item in self._items if "texts" not in item], usage=usage, error=error,
            completed_at=int(self._clock()) if status == "completed" else None, route=self.gathered.route,
        )  # fmt: skip

    def _part_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._about(kind, content_index=0, **fields)

    def _about(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _item_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}


class EventStream:
    """Events, as server-sent ones."""

    def __init__(self, events: Events) -> None:
        self._events = events

    @property
    def route(self) -> Route | None:
        return self._events.gathered.route

    def push(self, _: int, delta: Delta) -> bytes:
        return _sent(self._events.push(delta))

    def end(self) -> bytes:
        return _sent(self._events.end())

    def fail(self, error: CausewayError) -> bytes:
        return _sent(self._events.fail(error))


class WholeResponse:
    """One response in one piece: the one that the last event would have had."""

    def __init__(self, events: Events) -> None:
        self._events = events

    @property
    def route(self) -> Route | None:
        return self._events.gathered.route

    def push(self, _: int, delta: Delta) -> bytes:
        self._events.push(delta)
        return b""

    def end(self) -> bytes:
        return msgspec.json.encode(self._events.end()[-1]["response"])

    def fail(self, error: CausewayError) -> bytes:
        return error_body(error)


def response_object(
    call: ResponsesCall,
    response_id: str,
    created: int,
    status: str,
    *,
    output: Sequence[dict[str, Any]],
    usage: Usage | None,
    error: CausewayError | None,
    completed_at: int | None,
    route: Route | None,
) -> dict[str, Any]:
    fields = call.fields
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "completed_at": completed_at,
        "status": status,
        "error": None if error is None else _failure(error),
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": fields.model,
        "output": [dict(item) for item in output],
        "usage": None if usage is None else _usage(usage),
        "service_tier": service_tier(call.request.priority),
        "background": False,
        "reasoning": {"effort": None, "summary": None},
        "truncation": fields.truncation,
        **_repeated(fields),
        **({"causeway": causeway_object(route)} if route else {}),
    }


def _repeated(fields: ResponsesBody) -> dict[str, Any]:
    """What the client asked for, as the reply says again."""
    names = (
        "instructions", "max_output_tokens", "parallel_tool_calls", "previous_response_id", "store", "temperature",
        "tools", "top_logprobs", "top_p", "metadata", "user", "safety_identifier", "prompt_cache_key",
    )  # fmt: skip
    form = msgspec.to_builtins(fields.text.format) if fields.text.format else {"type": "text"}
    return {
        **{name: getattr(fields, name) for name in names},
        "tool_choice": msgspec.to_builtins(fields.tool_choice),
        "text": {"format": {name: value for name, value in form.items() if value}, "verbosity": "medium"},
    }


def _call_item(item_id: str, call: Called, status: str) -> dict[str, Any]:
    about = {"call_id": call.id, "name": call.name, "arguments": ""}
    return {"id": item_id, "type": "function_call", "status": status, **about}


def _part(text: str, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _failure(error: CausewayError) -> dict[str, Any]:
    """OpenAI has few codes here; ours stands beside."""
    code = "rate_limit_exceeded" if error.status == 429 else "server_error" if error.status >= 500 else "invalid_prompt"
    about = {"type": error.code, "param": error.param, "source": error.source, "retryable": error.retryable}
    return {"code": code, "message": error.message, **about}


def _sent(events: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(
        b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n" for event in events
    )
