"""Bodies of `POST /v1/responses`, read strictly: each field is honoured, harmless, or refused by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edge_agent.api.responses.items import read_items
from shared.bodies import CausewayOptions, StreamOptions
from shared.errors import BadRequest, UnsupportedParameter
from shared.formats import ANY_OBJECT, grammar, json_grammar
from shared.openai import read_fields, read_label, read_tier, stricter
from shared.schemas import MAX_TOOLS, ChatRequest, Grammar, Label, Message, Sampling, Tool, ToolChoice

LOGPROBS = "message.output_text.logprobs"
EMPTY_INCLUDES = ("reasoning.encrypted_content",)
"""What may be asked for, though no answer here has it."""
RENAMED: Mapping[str, str] = {
    "max_tokens": "max_output_tokens",
    "grammar": "text.format",
    "messages": "input",
    "deadline_s": "causeway.deadline_s",
}


class FormatBody(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    name: str = ""
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextBody(msgspec.Struct, forbid_unknown_fields=True):
    format: FormatBody | None = None
    verbosity: str | None = None


class ToolBody(msgspec.Struct, kw_only=True):
    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChoiceBody(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    name: str | None = None
    mode: str | None = None
    tools: list[dict[str, Any]] = []


class ResponsesBody(msgspec.Struct, kw_only=True):
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool = False
    store: bool = True
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    tools: list[dict[str, Any]] = []
    tool_choice: str | ChoiceBody = "auto"
    parallel_tool_calls: bool = True
    text: TextBody = msgspec.field(default_factory=TextBody)
    top_logprobs: int = 0
    include: list[str] = []
    service_tier: str = "auto"
    truncation: str = "disabled"
    causeway: CausewayOptions = msgspec.field(default_factory=CausewayOptions)
    # No part of the answer:
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
}
NEUTRAL_TOOL: Mapping[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
    "output_schema": (),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """What a later turn goes on from: the messages so far, without instructions, and the strictest label among them."""

    messages: tuple[Message, ...]
    label: Label


@dataclass(frozen=True, slots=True)
class ResponsesCall:
    """A body, read. `fields` is what the reply repeats; `turn` what a next one goes on from, but for the answer."""

    request: ChatRequest
    fields: ResponsesBody
    turn: Turn


def parse_response(
    raw: dict[str, Any], *, request_id: str, label: str | None, earlier: Callable[[str], Turn]
) -> ResponsesCall:
    """`earlier` finds the turn of a `previous_response_id`, or raises. Raises BadRequest naming the field."""
    fields = read_fields(raw, ResponsesBody, NEUTRAL)
    if fields.truncation != "disabled":
        raise UnsupportedParameter("what does not fit is refused, never cut", param="truncation")
    if fields.text.verbosity not in (None, "medium"):
        raise UnsupportedParameter("verbosity is not supported", param="text.verbosity")
    asked = read_label(fields.causeway, label)
    before = earlier(fields.previous_response_id) if fields.previous_response_id else Turn((), "free")
    turn = Turn((*before.messages, *read_items(fields.input)), stricter(asked, before.label))
    system = (Message(role="system", content=fields.instructions),) if fields.instructions else ()
    choice, allowed = _choice(fields.tool_choice)
    tools = _tools(fields.tools)
    try:
        request = ChatRequest(
            id=request_id,
            model=fields.model,
            messages=(*system, *turn.messages),
            sampling=_sampling(fields),
            grammar=_grammar(fields.text.format),
            tools=tools,
            tool_choice=choice if tools or choice == "required" else "auto",
            allowed_tools=allowed,
            parallel_tool_calls=fields.parallel_tool_calls if tools else True,
            label=turn.label,
            priority=read_tier(fields.service_tier),
            deadline_s=fields.causeway.deadline_s,
            scenario=fields.causeway.scenario,
        )
    except BadRequest as error:
        error.param = RENAMED.get(error.param or "", error.param)
        raise
    return ResponsesCall(request, fields, turn)


def _sampling(fields: ResponsesBody) -> Sampling:
    for at, name in enumerate(fields.include):
        if name != LOGPROBS and name not in EMPTY_INCLUDES:
            raise UnsupportedParameter(f"only {LOGPROBS} can be included", param=f"include[{at}]")
    if fields.top_logprobs and LOGPROBS not in fields.include:
        raise BadRequest(f"top_logprobs needs {LOGPROBS} in include", param="top_logprobs")
    return Sampling(
        temperature=fields.temperature,
        top_p=fields.top_p,
        max_tokens=fields.max_output_tokens,
        logprobs=fields.top_logprobs if LOGPROBS in fields.include else None,
    )


def _grammar(given: FormatBody | None) -> Grammar | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return grammar("json_schema", ANY_OBJECT, "text.format")
    if given.type != "json_schema" or given.schema is None:
        raise BadRequest("must be text, json_object, or json_schema with a schema", param="text.format")
    return json_grammar(given.schema, "text.format.schema")


def _tools(given: Sequence[dict[str, Any]]) -> tuple[Tool, ...]:
    if len(given) > MAX_TOOLS:
        raise BadRequest(f"at most {MAX_TOOLS} tools", param="tools")
    return tuple(_tool(raw, f"tools[{at}]") for at, raw in enumerate(given))


def _tool(raw: dict[str, Any], where: str) -> Tool:
    if raw.get("type") != "function":
        raise UnsupportedParameter("only tools of type function are supported", param=f"{where}.type")
    body = read_fields(raw, ToolBody, NEUTRAL_TOOL, where)
    given = {} if body.parameters is None else {"parameters": msgspec.json.encode(body.parameters).decode()}
    try:
        return Tool(name=body.name, description=body.description or "", strict=bool(body.strict), **given)
    except BadRequest as error:
        error.param = f"{where}.{error.param}"
        raise


def _choice(given: str | ChoiceBody) -> tuple[ToolChoice, tuple[str, ...]]:
    modes: dict[str, ToolChoice] = {"none": "none", "auto": "auto", "required": "required"}
    if isinstance(given, str):
        if given in modes:
            return modes[given], ()
    elif given.type == "function" and given.name is not None:
        return "required", (given.name,)
    elif given.type == "allowed_tools" and given.mode in ("auto", "required"):
        names = tuple(str(tool.get("name")) for tool in given.tools if tool.get("type") == "function")
        if names and len(names) == len(given.tools):
            return modes[given.mode], names
    raise BadRequest("must be none, auto, required, a function or allowed_tools", param="tool_choice")
