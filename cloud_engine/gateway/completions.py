"""OpenAI's `chat/completions` and `completions` from a client's side: a ChatRequest as a body, chunks as Deltas.

No I/O. Fields that OpenAI does not define (`top_k`, `min_p`, `repetition_penalty`, `ignore_eos`) are sent only where a
request sets them, since not every server knows them; so is `top_p`, because TGI refuses 1, and the `service_tier` of
batch work.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from cloud_engine.gateway.refusals import broken_off
from shared.errors import BadRequest, UpstreamFailed
from shared.formats import ANY_OBJECT
from shared.openai import COMPLETION_MAX_TOKENS
from shared.replies import NO_LOGPROB
from shared.schemas import (
    MAX_CALLS,
    ChatRequest,
    Delta,
    FinishReason,
    Grammar,
    Message,
    Sampling,
    TokenLogprob,
    Tool,
    ToolPiece,
    TopLogprob,
    Usage,
)
from shared.stops import StopScanner

DONE = b"[DONE]"
PROMPT_CHARS_PER_TOKEN = 4
"""For a server that says no usage."""

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos_token": "stop",  # TGI
    "stop_sequence": "stop",  # TGI
    "length": "length",
    "tool_calls": "tool_calls",
}

_Count = Annotated[int, Meta(ge=0, le=1 << 40)]
_Byte = Annotated[int, Meta(ge=0, le=255)]


def path_of(request: ChatRequest) -> str:
    return "chat/completions" if request.prompt is None else "completions"


def fields_of(request: ChatRequest, model: str, context_length: int) -> dict[str, Any]:
    """The body's fields. `model` is the upstream's own name for it, `context_length` its tokens in all."""
    sampling = request.sampling
    fields: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        **_set(sampling),
        **({"service_tier": "flex"} if request.priority == "batch" else {}),
        **_grammar(request.grammar),
    }
    if request.prompt is None:
        fields["messages"] = [_message(one) for one in request.messages]
        fields |= _tools(request)
        if sampling.logprobs is not None:
            fields["logprobs"] = True
            fields.update({"top_logprobs": sampling.logprobs} if sampling.logprobs else {})
        return fields
    fields["prompt"] = request.prompt
    # Left out it would be 16 there, but the rest of the context here. A prompt has no more tokens than bytes.
    rest = context_length - len(request.prompt.encode())
    fields.setdefault("max_tokens", max(COMPLETION_MAX_TOKENS, rest))
    if sampling.logprobs is not None:
        fields["logprobs"] = sampling.logprobs
    return fields


def _message(message: Message) -> dict[str, Any]:
    values = {"role": message.role, "content": message.content, "name": message.name}
    values["tool_call_id"] = message.tool_call_id
    fields: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return fields


def _tools(request: ChatRequest) -> dict[str, Any]:
    """Only the tools that may be called now: few servers know `allowed_tools`, but all know which they were given."""
    offered = request.calling
    if not offered:
        return {}
    fields: dict[str, Any] = {"tools": [_tool(tool) for tool in offered]}
    if request.tool_choice == "required":
        only = {"type": "function", "function": {"name": offered[0].name}}
        fields["tool_choice"] = only if len(offered) == 1 else "required"
    return fields if request.parallel_tool_calls else fields | {"parallel_tool_calls": False}


def _tool(tool: Tool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": msgspec.json.decode(tool.parameters),
        **({"strict": True} if tool.strict else {}),
    }
    return {"type": "function", "function": function}


def _grammar(grammar: Grammar | None) -> dict[str, Any]:
    """A schema by OpenAI's field, which most servers know; the others by vLLM's."""
    if grammar is None:
        return {}
    if grammar.syntax != "json_schema":
        return {"structured_outputs": {"regex" if grammar.syntax == "regex" else "grammar": grammar.text}}
    if grammar.text == ANY_OBJECT:
        return {"response_format": {"type": "json_object"}}
    schema = {"name": "answer", "schema": msgspec.json.decode(grammar.text), "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _set(sampling: Sampling) -> dict[str, Any]:
    """What differs from the default; each default is also what a server does without the field."""
    names: tuple[str, ...] = (
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
    )
    neutral = Sampling()
    names += ("max_tokens", "stop", "ignore_eos", "min_tokens", "stop_token_ids", "logit_bias")
    values = {name: getattr(sampling, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(neutral, name)}


class _Top(Struct):
    token: str
    logprob: float | None = None
    bytes: list[_Byte] | None = None


class _Token(_Top):
    top_logprobs: list[_Top] | None = None


class _Logprobs(Struct):
    """`content` is the form of chat; the parallel lists are that of completions."""

    content: list[_Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float | None] | None] | None = None


class _Function(Struct):
    name: str | None = None
    arguments: str | None = None


class _Called(Struct):
    index: _Count = 0
    id: str | None = None
    function: _Function | None = None


class _Message(Struct):
    tool_calls: list[_Called] | None = None
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(Struct):
    delta: _Message | None = None
    text: str | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _PromptDetails(Struct):
    cached_tokens: _Count | None = None


class _Usage(Struct):
    prompt_tokens: _Count
    completion_tokens: _Count = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    object: str | None = None


class ChunkReader:
    """The chunks of one streamed answer as Deltas: `read` each event until `done`, then take `last`.

    Stop strings are looked for here too: some servers know only four of them, or leave the one they met in the text.
    A model's reasoning, where a server sends it apart, counts as tokens and is not passed on.
    """

    def __init__(self, request: ChatRequest, fields: dict[str, Any]) -> None:
        self.done = False
        self.tokens = 0
        self._fields = fields
        self._top = request.sampling.logprobs or 0
        self._lacks_logprobs = request.sampling.logprobs is not None
        self._scanner = StopScanner(request.sampling.stop)
        self._names = frozenset(tool.name for tool in request.calling)
        self._calls: set[int] = set()
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None
        self._prompt_estimate = max(1, request.size // PROMPT_CHARS_PER_TOKEN)

    def read(self, event: bytes) -> Delta | None:
        """What this event adds to the answer. Raises the error it tells of, or UpstreamFailed where it is none."""
        if event.strip() == DONE:
            self.done = True
            return None
        try:
            chunk = msgspec.json.decode(event, type=_Chunk)
        except (ValueError, RecursionError) as error:
            raise UpstreamFailed("an event of the upstream is no chunk of an answer", source="cloud") from error
        if chunk.error is not None or chunk.object == "error":
            raise broken_off(msgspec.json.decode(event), self._fields)
        if chunk.usage is not None:
            self._usage = _usage(chunk.usage)
        return self._piece(chunk.choices[0]) if chunk.choices else None

    def last(self) -> Delta:
        """The end of the answer. Raises UpstreamFailed if it has none."""
        if self._finish is None or (self._finish == "tool_calls" and not self._calls):
            raise UpstreamFailed("the upstream ended in the middle of its answer", source="cloud")
        if self._finish == "stop" and self._calls:  # what vLLM says of a call that was asked for
            self._finish = "tool_calls"
        counted = Usage(prompt_tokens=self._prompt_estimate, completion_tokens=self.tokens)
        usage, stop = self._usage or counted, self._scanner.hit
        return Delta(text=self._scanner.flush(), finish_reason=self._finish, usage=usage, stop=stop)

    def _piece(self, choice: _Choice) -> Delta | None:
        message = choice.delta or _Message()
        text = choice.text or message.content or message.refusal or ""
        thought = bool(message.reasoning_content or message.reasoning)
        logprobs = _tokens(choice.logprobs, self._top) if choice.logprobs else ()
        self._lacks_logprobs = self._lacks_logprobs and not logprobs
        if self._lacks_logprobs and text:  # some servers pass over what they do not know
            raise BadRequest("the upstream gives no logprobs", param="logprobs", source="cloud")
        calls = tuple(self._call(one) for one in message.tool_calls or ())
        tokens = len(logprobs) or int(bool(text) or thought or bool(calls))
        self.tokens += tokens
        if choice.finish_reason is not None:
            self._finish = _reason(choice.finish_reason)
        shown = self._scanner.push(text) if text else ""
        if self._scanner.hit is not None:
            self._finish, self.done = "stop", True
        if not (tokens or shown):
            return None
        return Delta(text=shown, tokens=tokens, logprobs=logprobs, tool_calls=calls)

    def _call(self, said: _Called) -> ToolPiece:
        """Raises UpstreamFailed for a call of what was not offered, or one that goes on without having begun."""
        function = said.function or _Function()
        if said.index in self._calls:
            return ToolPiece(said.index, function.arguments or "")
        if function.name not in self._names or len(self._calls) >= MAX_CALLS:
            raise UpstreamFailed("the upstream calls what it was not given to call", source="cloud")
        self._calls.add(said.index)
        return ToolPiece(said.index, function.arguments or "", (said.id or f"call_{said.index}")[:128], function.name)


def _reason(name: str) -> FinishReason:
    """Raises UpstreamFailed for an end that is none of the answer's own: aborted there, filtered, a tool's call."""
    if name not in _REASONS:
        raise UpstreamFailed("the upstream ended the answer for a reason of its own", source="cloud")
    return _REASONS[name]


def _usage(said: _Usage) -> Usage:
    cached = said.prompt_tokens_details.cached_tokens if said.prompt_tokens_details else None
    return Usage(prompt_tokens=said.prompt_tokens, completion_tokens=said.completion_tokens, cached_tokens=cached or 0)


def _tokens(said: _Logprobs, top: int) -> tuple[TokenLogprob, ...]:
    if said.content is not None:
        return tuple(
            TokenLogprob(
                one.token,
                _logprob(one.logprob),
                _bytes(one),
                tuple(_top(other) for other in (one.top_logprobs or ())[:top]),
            )
            for one in said.content
        )
    tokens, count = said.tokens or [], len(said.tokens or ())
    values, tops = said.token_logprobs or [None] * count, said.top_logprobs or [None] * count
    if len(values) != count or len(tops) != count:
        raise UpstreamFailed("the upstream's logprobs do not fit its tokens", source="cloud")
    return tuple(
        TokenLogprob(token, _logprob(value), tuple(token.encode()), _listed(others, top))
        for token, value, others in zip(tokens, values, tops, strict=True)
    )


def _listed(others: dict[str, float | None] | None, top: int) -> tuple[TopLogprob, ...]:
    likeliest = sorted((others or {}).items(), key=lambda item: _logprob(item[1]), reverse=True)[:top]
    return tuple(TopLogprob(token, _logprob(value), tuple(token.encode())) for token, value in likeliest)


def _top(one: _Top) -> TopLogprob:
    return TopLogprob(one.token, _logprob(one.logprob), _bytes(one))


def _bytes(one: _Top) -> tuple[int, ...]:
    return tuple(one.token.encode() if one.bytes is None else one.bytes)


def _logprob(value: float | None) -> float:
    return NO_LOGPROB if value is None else value
