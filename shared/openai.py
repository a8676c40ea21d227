"""OpenAI request bodies, read strictly: every field is honoured, harmless, or refused by name. Nothing is dropped.

`parse_chat` and `parse_completion` turn the bytes of a body into a `Call`: `n` ChatRequests and how to reply. A field
(see `shared.bodies`) is

- implemented, with its type checked (a bool is no number, 1.0 is no integer);
- harmless: typed too, but never read, because it cannot change the answer (`user`, `store`, ...);
- unimplemented: accepted with the value that OpenAI takes when it is left out, else UnsupportedParameter;
- unknown: BadRequest.

`null` means left out, as it does at OpenAI. Extensions: `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`,
`min_tokens`, `stop_token_ids`, `structured_outputs` (vLLM's name for grammars), and
`causeway: {"label": "edge_only", "deadline_s": 30}`. `service_tier` is `flex` for batch work, as OpenAI calls what may
be slow; every other tier is interactive. It is known to `completions` too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from shared.asked_tools import ToolsAsked, read_calls, read_tools
from shared.bodies import (
    NEUTRAL_CHAT,
    NEUTRAL_COMPLETION,
    NEUTRAL_MESSAGE,
    NEUTRAL_PART,
    CausewayOptions,
    ChatBody,
    CommonBody,
    CompletionBody,
    MessageBody,
    PartBody,
    StreamOptions,
)
from shared.errors import BadRequest, UnsupportedParameter
from shared.formats import read_grammar
from shared.schemas import LABELS, MAX_LOGIT_BIAS, SEED_BITS, ChatRequest, Label, Message, Priority, Role, Sampling

MAX_N = 8
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for `completions`; chat has none."""

Kind = Literal["chat", "completion"]

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_TIERS: Mapping[str, Priority] = {
    "auto": "interactive",
    "default": "interactive",
    "priority": "interactive",
    "scale": "interactive",
    "flex": "batch",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP body: `requests` has one entry a choice, in the order of their index."""

    kind: Kind
    requests: tuple[ChatRequest, ...]
    stream: bool
    include_usage: bool
    grammar_field: str = "response_format"
    """Where the body has its grammar, so that an error can name what the client wrote."""

    @property
    def model(self) -> str:
        return self.requests[0].model

    @property
    def deadline_s(self) -> float | None:
        return self.requests[0].deadline_s


_S = TypeVar("_S", bound=msgspec.Struct)


def parse_chat(body: bytes, *, request_id: str, label: str | None = None) -> Call:
    """Read the body of `POST /v1/chat/completions`. Raises BadRequest naming the field (`param`).

    `label` is what the header `x-causeway-label` says; the stricter of header and body holds.
    """
    chat = read_fields(json_object(body), ChatBody, NEUTRAL_CHAT)
    if chat.top_logprobs is not None and not chat.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    limits = {chat.max_tokens, chat.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise BadRequest("max_tokens and max_completion_tokens differ", param="max_completion_tokens")
    if not chat.messages:
        raise BadRequest("messages must not be empty", param="messages")
    messages = tuple(_message(raw, f"messages[{at}]") for at, raw in enumerate(chat.messages))
    logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
    renamed = {"max_tokens": "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"}
    sampling = _sampling(chat, max_tokens=limits.pop() if limits else None, logprobs=logprobs, renamed=renamed)
    return _call("chat", chat, sampling, request_id, label, messages=messages, asked=read_tools(chat))


def parse_completion(body: bytes, *, request_id: str, label: str | None = None) -> Call:
    """Read the body of `POST /v1/completions`; otherwise like `parse_chat`."""
    text = read_fields(json_object(body), CompletionBody, NEUTRAL_COMPLETION)
    prompt = text.prompt
    if isinstance(prompt, list):
        if len(prompt) != 1 or not isinstance(prompt[0], str):
            raise UnsupportedParameter("prompt must be one string: no token ids, no several prompts", param="prompt")
        prompt = prompt[0]
    limit = COMPLETION_MAX_TOKENS if text.max_tokens is None else text.max_tokens
    sampling = _sampling(text, max_tokens=limit, logprobs=text.logprobs, renamed={"top_logprobs": "logprobs"})
    return _call("completion", text, sampling, request_id, label, prompt=prompt)


def _call(
    kind: Kind,
    body: CommonBody,
    sampling: Sampling,
    request_id: str,
    label: str | None,
    *,
    messages: tuple[Message, ...] = (),
    prompt: str | None = None,
    asked: ToolsAsked | None = None,
) -> Call:
    if not 1 <= body.n <= MAX_N:
        raise BadRequest(f"n must be at least 1 and at most {MAX_N}", param="n")
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options needs stream to be true", param="stream_options")
    try:
        one = ChatRequest(
            id=request_id,
            model=body.model,
            messages=messages,
            prompt=prompt,
            sampling=sampling,
            **({} if asked is None else asked._asdict()),
            grammar=read_grammar(body.response_format, body.structured_outputs),
            label=read_label(body.causeway, label),
            priority=read_tier(body.service_tier),
            deadline_s=body.causeway.deadline_s,
            scenario=body.causeway.scenario,
        )
    except BadRequest as error:
        where = "response_format" if body.structured_outputs is None else "structured_outputs"
        error.param = {"deadline_s": "causeway.deadline_s", "grammar": where}.get(error.param or "", error.param)
        raise
    options = body.stream_options or StreamOptions()
    return Call(
        kind=kind,
        requests=_fan_out(one, body.n),
        stream=body.stream,
        include_usage=options.include_usage,
        grammar_field="response_format" if body.structured_outputs is None else "structured_outputs",
    )


def _fan_out(one: ChatRequest, n: int) -> tuple[ChatRequest, ...]:
    """n requests for n choices: each its own id and, where one is given, its own seed."""
    if n == 1:
        return (one,)
    return tuple(
        msgspec.structs.replace(one, id=f"{one.id}-{at}", sampling=_reseeded(one.sampling, at)) for at in range(n)
    )


def _reseeded(sampling: Sampling, by: int) -> Sampling:
    if sampling.seed is None:
        return sampling
    half = 1 << SEED_BITS
    return msgspec.structs.replace(sampling, seed=(sampling.seed + by + half) % (2 * half) - half)


def _sampling(
    body: CommonBody, *, max_tokens: int | None, logprobs: int | None, renamed: Mapping[str, str]
) -> Sampling:
    """`renamed`: what a field of Sampling is called in this body, so that an error names what the client wrote."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    try:
        return Sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            seed=body.seed,
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
            ignore_eos=body.ignore_eos,
            min_tokens=body.min_tokens,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logit_bias=_biases(body.logit_bias),
        )
    except BadRequest as error:
        error.param = renamed.get(error.param or "", error.param)
        raise


def _biases(raw: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are strings; a token's id has no other spelling than its decimal one."""
    if len(raw) > MAX_LOGIT_BIAS or not all(key.isascii() and key.isdecimal() and len(key) < 9 for key in raw):
        raise BadRequest(f"logit_bias must map at most {MAX_LOGIT_BIAS} token ids to numbers", param="logit_bias")
    return {int(key): float(bias) for key, bias in raw.items()}


def _message(raw: dict[str, Any], where: str) -> Message:
    message = read_fields(raw, MessageBody, NEUTRAL_MESSAGE, where)
    role = _ROLES.get(message.role)
    if role is None:
        raise BadRequest(f"role must be one of {', '.join(_ROLES)}", param=f"{where}.role")
    content = message.content
    if content is None:
        if not message.tool_calls:
            raise BadRequest("content is missing", param=f"{where}.content")
        content = ""
    if not isinstance(content, str):
        content = "".join(_text(part, f"{where}.content[{at}]") for at, part in enumerate(content))
    try:
        return Message(
            role=role,
            content=content,
            name=message.name,
            tool_calls=read_calls(message.tool_calls, where),
            tool_call_id=message.tool_call_id,
        )
    except BadRequest as error:
        error.param = f"{where}.tool_calls" if error.param == "tool_calls" else error.param
        raise


def _text(raw: dict[str, Any], where: str) -> str:
    kind = raw.get("type")
    if isinstance(kind, str) and kind != "text":
        known = kind if kind in NEUTRAL_PART else "this type"
        raise UnsupportedParameter(f"only parts of type text are supported, not {known}", param=f"{where}.type")
    return read_fields(raw, PartBody, NEUTRAL_PART, where).text


def read_label(options: CausewayOptions, header: str | None) -> Label:
    """The stricter of what body and header say. Raises BadRequest."""
    return stricter(_label(options.label, "causeway.label"), _label(header or "free", "x-causeway-label"))


def _label(value: str, param: str) -> Label:
    for label in LABELS:
        if value == label:
            return label
    raise BadRequest(f"label must be {', '.join(LABELS[:-1])} or {LABELS[-1]}", param=param)


def read_tier(tier: str) -> Priority:
    """Raises BadRequest."""
    if tier not in _TIERS:
        raise BadRequest(f"service_tier must be one of {', '.join(_TIERS)}", param="service_tier")
    return _TIERS[tier]


def stricter(one: Label, other: Label) -> Label:
    return next(label for label in LABELS if label in (one, other))


def json_object(body: bytes) -> dict[str, Any]:
    """A body that is one JSON object. Raises BadRequest."""
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise BadRequest("the body is not valid UTF-8", param=_undecodable(body)) from error
    except msgspec.DecodeError as error:
        reason = str(error).partition(" - at ")[0]
        raise BadRequest(f"the body is not valid JSON: {reason}", param=_undecodable(body)) from error
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply", param=_undecodable(body)) from error
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def _undecodable(body: bytes) -> str | None:
    """The field whose value cannot be decoded (1e309, half a surrogate pair, ...), if the object around it can."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        return None
    for name, value in fields.items():
        try:
            msgspec.json.decode(value)
        except (ValueError, RecursionError):
            return _shown(name)
    return None


def read_fields(raw: dict[str, Any], model: type[_S], neutral: Mapping[str, tuple[Any, ...]], where: str = "") -> _S:
    """Check names first, so that an unknown field is told from an unimplemented one, then types."""
    prefix = f"{where}." if where else ""
    given = {name: value for name, value in raw.items() if value is not None}
    for name in raw.keys() - set(model.__struct_fields__):
        if name not in neutral:
            shown = _shown(name)
            raise BadRequest(f"unknown field {prefix}{shown}", param=f"{prefix}{shown}")
        value = given.pop(name, None)
        if value is not None and not any(type(value) is type(same) and value == same for same in neutral[name]):
            raise UnsupportedParameter(f"{prefix}{name} is not supported", param=f"{prefix}{name}")
    try:
        return msgspec.convert(given, model)
    except msgspec.ValidationError as error:
        raise _named(error, prefix) from error


def _named(error: msgspec.ValidationError, prefix: str) -> BadRequest:
    """msgspec says `Expected int, got bool - at $.n`, never a value: name the field the way a client wrote it."""
    text, _, path = str(error).replace("`", "").partition(" - at $.")
    named = re.search(r"field (\S+)$", text)
    param = prefix + ".".join(part for part in (path, named.group(1) if named else "") if part)
    if "missing required" in text:
        return BadRequest(f"{param} is missing", param=param)
    return BadRequest(f"{param or 'body'}: {_shown(text, 200)}", param=param or None)


def _shown(text: str, size: int = 64) -> str:
    """A caller's own name for a field, short and on one line."""
    return "".join(char if char.isprintable() and char.isascii() else "?" for char in text[:size])
