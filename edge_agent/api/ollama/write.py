"""Answers and errors as Ollama's JSON: one object a line while streaming, or one for all. Durations in nanoseconds."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec

from edge_agent.api.gathered import Called, Gathered
from shared.errors import CausewayError
from shared.replies import causeway_object, marked, token_logprob
from shared.schemas import Delta, Route, TokenLogprob

Kind = Literal["chat", "generate"]
NANO = 1_000_000_000


def error_body(error: CausewayError) -> bytes:
    """Ollama's error is a text; the code, the field, who failed and whether trying again can help stand beside it."""
    about = {"code": error.code, "param": error.param, "source": error.source, "retryable": error.retryable}
    return msgspec.json.encode({"error": error.message, **about})


class _Encoder:
    """`clock` gives seconds, `now` the time of day."""

    def __init__(self, kind: Kind, model: str, *, clock: Callable[[], float], now: Callable[[], datetime]) -> None:
        self._kind = kind
        self._model = model
        self._clock = clock
        self._now = now
        self._began = clock()
        self._first: float | None = None
        self._gathered = Gathered()
        self.route: Route | None = None

    def _take(self, delta: Delta) -> None:
        if self._first is None:
            self._first = self._clock()
        self._gathered.add(delta)
        self.route = self._gathered.route

    def _object(self, text: str, calls: Sequence[Called], logprobs: Sequence[TokenLogprob], **rest: Any) -> bytes:
        created = self._now().isoformat().replace("+00:00", "Z")
        said: dict[str, Any] = {"response": text}
        if self._kind == "chat":
            said = {"message": {"role": "assistant", "content": text}}
            if calls:
                said["message"]["tool_calls"] = [_call(call) for call in calls]
        probabilities = {"logprobs": [token_logprob(token) for token in logprobs]} if logprobs else {}
        return msgspec.json.encode({"model": self._model, "created_at": created, **said, **probabilities, **rest})

    def _ending(self) -> dict[str, Any]:
        gathered, ended = self._gathered, self._clock()
        first = self._first or ended
        return {
            "done": True,
            "done_reason": "length" if gathered.reason == "length" else "stop",
            "total_duration": _nanoseconds(ended - self._began),
            "load_duration": 0,
            "prompt_eval_count": gathered.usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first - self._began),
            "eval_count": gathered.usage.completion_tokens,
            "eval_duration": _nanoseconds(ended - first),
            **({"causeway": causeway_object(self.route)} if self.route else {}),
        }

    def fail(self, error: CausewayError) -> bytes:
        return error_body(error) + b"\n"


class WholeObject(_Encoder):
    """One reply in one piece."""

    def push(self, _: int, delta: Delta) -> bytes:
        self._take(delta)
        return b""

    def end(self) -> bytes:
        gathered, ending = self._gathered, self._ending()
        return self._object(gathered.text, gathered.whole_calls, gathered.logprobs, **ending)


class Lines(_Encoder):
    """One streamed reply. A call is said once it is whole."""

    _said = 0
    """How many calls have been."""

    def push(self, _: int, delta: Delta) -> bytes:
        self._take(delta)
        lines = b""
        if delta.text or delta.logprobs:
            lines = self._object(delta.text, (), delta.logprobs, done=False, **marked(delta)) + b"\n"
        if delta.finish_reason is None:
            return lines + self._calls(list(self._gathered.calls.values())[:-1])  # the last may still be written
        return lines + self._calls(self._gathered.whole_calls)

    def end(self) -> bytes:
        return self._object("", (), (), **self._ending()) + b"\n"

    def _calls(self, whole: list[Called]) -> bytes:
        new, self._said = whole[self._said :], max(self._said, len(whole))
        return b"".join(self._object("", [call], (), done=False) + b"\n" for call in new)


def loaded_object(kind: Kind, model: str, reason: str, now: datetime) -> bytes:
    """What is said to who asked nothing, but for the model to be there or to go."""
    said: dict[str, Any] = {"response": ""} if kind == "generate" else {"message": {"role": "assistant", "content": ""}}
    created = now.isoformat().replace("+00:00", "Z")
    return msgspec.json.encode({"model": model, "created_at": created, **said, "done": True, "done_reason": reason})


def _call(call: Called) -> dict[str, Any]:
    return {"id": call.id, "function": {"name": call.name, "arguments": call.object()}}


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * NANO))
