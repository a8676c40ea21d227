"""Ollama's request bodies, read strictly: each field is honoured, harmless, or refused by name (`shared.openai`).

What is left out means what it means at Ollama: temperature 0.8, top_k 40, top_p 0.9, streamed. Options about memory and
threads are harmless, and so is `num_ctx`: a model's whole context is always there, and what does not fit is refused.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shared.asked_tools import read_tool
from shared.bodies import CausewayOptions, ToolBody
from shared.errors import BadRequest
from shared.formats import ANY_OBJECT, grammar, json_grammar
from shared.openai import json_object, read_fields, read_label
from shared.schemas import MAX_TOOLS, ChatRequest, Grammar, Message, Role, Sampling, ToolCall

ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
RENAMED: Mapping[str, str] = {
    "grammar": "format",
    "deadline_s": "causeway.deadline_s",
    **{name: f"options.{name}" for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop")},
    **{name: f"options.{name}" for name in ("presence_penalty", "frequency_penalty")},
    "repetition_penalty": "options.repeat_penalty",
    "max_tokens": "options.num_predict",
}
MAX_DURATION_CHARS = 64
UNLIMITED = (-1, -2)
"""For `num_predict`: to the model's own end, to the end of its context."""


class OptionsBody(msgspec.Struct, kw_only=True):
    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int = 40
    min_p: float = 0.0
    seed: int | None = None
    num_predict: int = -1
    stop: str | list[str] = []
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # No part of the answer:
    num_ctx: int = 0
    num_keep: int = 0
    num_batch: int = 0
    num_gpu: int = 0
    main_gpu: int = 0
    num_thread: int = 0
    numa: bool = False
    low_vram: bool = False
    f16_kv: bool = True
    use_mmap: bool = True
    use_mlock: bool = False
    logits_all: bool = False
    vocab_only: bool = False
    embedding_only: bool = False
    mirostat_eta: float = 0.1
    mirostat_tau: float = 5.0


class CommonBody(msgspec.Struct, kw_only=True):
    model: str
    stream: bool = True
    format: str | dict[str, Any] = ""
    options: dict[str, Any] = {}
    keep_alive: float | str | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    causeway: CausewayOptions = msgspec.field(default_factory=CausewayOptions)


class ChatBody(CommonBody, kw_only=True):
    messages: list[dict[str, Any]] = []
    tools: list[ToolBody] = []


class GenerateBody(CommonBody, kw_only=True):
    prompt: str = ""
    system: str = ""
    raw: bool = False


class CalledBody(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any]
    index: int = 0


class CallBody(msgspec.Struct, forbid_unknown_fields=True):
    function: CalledBody
    id: str = ""
    type: str = "function"


class MessageBody(msgspec.Struct, kw_only=True):
    role: str
    content: str = ""
    tool_calls: list[CallBody] = []
    tool_name: str | None = None
    tool_call_id: str | None = None


NEUTRAL: Mapping[str, tuple[Any, ...]] = {"shift": (False,), "think": (False,), "truncate": (False,)}
NEUTRAL_GENERATE: Mapping[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "context": ([],),
    "height": (),
    "images": ([],),
    "steps": (),
    "suffix": ("",),
    "template": ("",),
    "width": (),
}
NEUTRAL_MESSAGE: Mapping[str, tuple[Any, ...]] = {"images": ([],), "thinking": ("",)}
NEUTRAL_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "penalize_newline": (True,),
    "repeat_last_n": (-1,),
    "tfs_z": (1.0, 1),
    "typical_p": (1.0, 1),
}


_DURATION = re.compile(r"-?(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+|-?\d+(?:\.\d+)?")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Keep:
    """How long a model stays after its last answer; `seconds` None: for ever."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class OllamaCall:
    """`request` None: nothing is asked, the model is only to be there (or, with a `keep` of 0, no more)."""

    model: str
    request: ChatRequest | None
    stream: bool
    keep: Keep | None


def parse_chat(body: bytes, *, request_id: str, label: str | None = None) -> OllamaCall:
    """Read the body of `POST /api/chat`. Raises BadRequest naming the field (`param`)."""
    fields = read_fields(json_object(body), ChatBody, NEUTRAL)
    if not fields.messages:
        return _nothing(fields)
    if len(fields.tools) > MAX_TOOLS:
        raise BadRequest(f"at most {MAX_TOOLS} tools", param="tools")
    tools = tuple(read_tool(one.function, one.type, f"tools[{at}]") for at, one in enumerate(fields.tools))
    return _call(fields, request_id, label, messages=tuple(_messages(fields.messages)), tools=tools)


def parse_generate(body: bytes, *, request_id: str, label: str | None = None) -> OllamaCall:
    """Read the body of `POST /api/generate`: a prompt becomes what the user says, or with `raw` goes in as it is."""
    fields = read_fields(json_object(body), GenerateBody, NEUTRAL_GENERATE)
    if not fields.prompt:
        return _nothing(fields)
    if fields.raw:
        if fields.system:
            raise BadRequest("a raw prompt has no place for system", param="system")
        return _call(fields, request_id, label, prompt=fields.prompt)
    system = (Message(role="system", content=fields.system),) if fields.system else ()
    return _call(fields, request_id, label, messages=(*system, Message(role="user", content=fields.prompt)))


def _nothing(fields: CommonBody) -> OllamaCall:
    return OllamaCall(fields.model, None, fields.stream, _keep(fields.keep_alive))


def _keep(given: float | str | None) -> Keep | None:
    """Seconds, or a duration such as `1h30m`; what is negative is for ever. Raises BadRequest."""
    if given is None:
        return None
    seconds = float(given) if not isinstance(given, str) else _seconds(given)
    if seconds is None or not math.isfinite(seconds):
        raise BadRequest("keep_alive must be seconds, or a duration such as 5m", param="keep_alive")
    return Keep(None if seconds < 0 else seconds)


def _seconds(text: str) -> float | None:
    if len(text) > MAX_DURATION_CHARS or not _DURATION.fullmatch(text):
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)([a-zµ]*)", text)
    return sum(float(number) * _UNITS[unit or "s"] for number, unit in parts) * (-1 if text.startswith("-") else 1)


def _call(fields: CommonBody, request_id: str, label: str | None, **content: Any) -> OllamaCall:
    try:
        request = ChatRequest(
            id=request_id,
            model=fields.model,
            sampling=_sampling(fields),
            grammar=_grammar(fields.format),
            label=read_label(fields.causeway, label),
            deadline_s=fields.causeway.deadline_s,
            scenario=fields.causeway.scenario,
            **content,
        )
    except BadRequest as error:
        error.param = RENAMED.get(error.param or "", error.param)
        raise
    return OllamaCall(fields.model, request, fields.stream, _keep(fields.keep_alive))


def _sampling(fields: CommonBody) -> Sampling:
    options = read_fields(fields.options, OptionsBody, NEUTRAL_OPTIONS, "options")
    if fields.top_logprobs and not fields.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        repetition_penalty=options.repeat_penalty,
        seed=options.seed,
        max_tokens=None if options.num_predict in UNLIMITED else options.num_predict,
        stop=(options.stop,) if isinstance(options.stop, str) else tuple(options.stop),
        logprobs=fields.top_logprobs if fields.logprobs else None,
    )


def _grammar(given: str | dict[str, Any]) -> Grammar | None:
    if isinstance(given, dict):
        return json_grammar(given, "format")
    if given not in ("", "json"):
        raise BadRequest("format must be json or a JSON Schema", param="format")
    return grammar("json_schema", ANY_OBJECT, "format") if given else None


def _messages(given: Sequence[dict[str, Any]]) -> Iterator[Message]:
    """Ollama's calls need no ids: a result belongs to the first call that has none yet, of its tool if it names one."""
    waiting: list[ToolCall] = []
    for at, raw in enumerate(given):
        one = read_fields(raw, MessageBody, NEUTRAL_MESSAGE, f"messages[{at}]")
        if one.role not in ROLES:
            raise BadRequest(f"role must be one of {', '.join(ROLES)}", param=f"messages[{at}].role")
        calls = tuple(_called(call, f"call_{at}_{number}") for number, call in enumerate(one.tool_calls))
        answers = None
        if one.role == "tool":
            found = next((call for call in waiting if one.tool_name in (None, call.name)), None)
            answers = one.tool_call_id or (found.id if found else f"call_{at}")
            waiting = [call for call in waiting if call.id != answers]
        try:
            yield Message(
                role=ROLES[one.role], content=one.content, name=one.tool_name, tool_calls=calls, tool_call_id=answers
            )
        except BadRequest as error:
            error.param = f"messages[{at}].{error.param}"
            raise
        waiting += calls


def _called(call: CallBody, own_id: str) -> ToolCall:
    arguments = msgspec.json.encode(call.function.arguments).decode()
    return ToolCall(id=call.id or own_id, name=call.function.name, arguments=arguments)
