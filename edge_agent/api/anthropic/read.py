"""Anthropic's request bodies, read strictly: each field is honoured, harmless, or refused by name (`shared.openai`)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from shared.bodies import CausewayOptions
from shared.errors import BadRequest, UnsupportedParameter
from shared.formats import json_grammar
from shared.openai import json_object, read_fields, read_label
from shared.schemas import MAX_TOOLS, ChatRequest, Grammar, Message, Sampling, Tool, ToolCall, ToolChoice

TIERS = ("auto", "standard_only")
RENAMED: Mapping[str, str] = {
    "stop": "stop_sequences",
    "grammar": "output_config.format",
    "deadline_s": "causeway.deadline_s",
}


class OutputFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    format: OutputFormat | None = None


class ChoiceBody(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ToolBody(msgspec.Struct, kw_only=True):
    name: str
    input_schema: dict[str, Any]
    type: str = "custom"
    description: str | None = None
    strict: bool = False
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool = False


class PromptBody(msgspec.Struct, kw_only=True):
    """What both routes take: all that a prompt is made of."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] = ""
    tools: list[dict[str, Any]] = []
    tool_choice: ChoiceBody | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None
    causeway: CausewayOptions = msgspec.field(default_factory=CausewayOptions)


class MessagesBody(PromptBody, kw_only=True):
    max_tokens: int
    stream: bool = False
    stop_sequences: list[str] = []
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    metadata: dict[str, str | None] | None = None
    service_tier: str = "auto"


class TurnBody(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[dict[str, Any]]


class TextBlock(msgspec.Struct, kw_only=True):
    type: str
    text: str
    cache_control: dict[str, Any] | None = None


class UseBlock(msgspec.Struct, kw_only=True):
    type: str
    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None


class ResultBlock(msgspec.Struct, kw_only=True):
    type: str
    tool_use_id: str
    content: str | list[dict[str, Any]] = ""
    is_error: bool = False
    cache_control: dict[str, Any] | None = None


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "output_format": (),
    "speed": ("standard",),
    "thinking": ({"type": "disabled"},),
}
NEUTRAL_TOOL: Mapping[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "input_examples": ([],),
}
NEUTRAL_BLOCK: Mapping[str, tuple[Any, ...]] = {"caller": ({"type": "direct"},), "citations": ([],), "toolset_name": ()}


def parse_messages(body: bytes, *, request_id: str, label: str | None = None) -> tuple[ChatRequest, bool]:
    """Read the body of `POST /v1/messages`: the request, and whether to stream. Raises BadRequest naming the field."""
    fields = read_fields(json_object(body), MessagesBody, NEUTRAL)
    if fields.service_tier not in TIERS:
        raise BadRequest(f"service_tier must be one of {', '.join(TIERS)}", param="service_tier")
    try:
        sampling = Sampling(
            temperature=fields.temperature,
            top_p=fields.top_p,
            top_k=fields.top_k,
            max_tokens=fields.max_tokens,
            stop=tuple(fields.stop_sequences),
        )
    except BadRequest as error:
        error.param = RENAMED.get(error.param or "", error.param)
        raise
    return _request(fields, sampling, request_id, label), fields.stream


def parse_count(body: bytes, *, request_id: str) -> ChatRequest:
    """Read the body of `POST /v1/messages/count_tokens`."""
    return _request(read_fields(json_object(body), PromptBody, NEUTRAL), Sampling(), request_id, None)


def _request(fields: PromptBody, sampling: Sampling, request_id: str, label: str | None) -> ChatRequest:
    choice, allowed, parallel = _choice(fields.tool_choice)
    tools = _tools(fields.tools)
    try:
        return ChatRequest(
            id=request_id,
            model=fields.model,
            messages=tuple(_messages(fields)),
            sampling=sampling,
            grammar=_grammar(fields.output_config),
            tools=tools,
            tool_choice=choice if tools or choice == "required" else "auto",
            allowed_tools=allowed,
            parallel_tool_calls=parallel if tools else True,
            label=read_label(fields.causeway, label),
            deadline_s=fields.causeway.deadline_s,
            scenario=fields.causeway.scenario,
        )
    except BadRequest as error:
        error.param = RENAMED.get(error.param or "", error.param)
        raise


def _messages(fields: PromptBody) -> Iterator[Message]:
    if not fields.messages:
        raise BadRequest("messages must not be empty", param="messages")
    system = fields.system if isinstance(fields.system, str) else _texts(fields.system, "system")
    if system:
        yield Message(role="system", content=system)
    for at, raw in enumerate(fields.messages):
        turn = read_fields(raw, TurnBody, {}, f"messages[{at}]")
        if turn.role == "user":
            yield from _asked(turn.content, f"messages[{at}].content")
        elif turn.role == "assistant":
            yield _answered(turn.content, f"messages[{at}].content")
        else:
            raise BadRequest("role must be user or assistant", param=f"messages[{at}].role")
    if turn.role == "assistant":
        raise UnsupportedParameter(
            "the beginning of an answer cannot be given: the last message must be the user's",
            param=f"messages[{len(fields.messages) - 1}]",
        )


def _asked(content: str | list[dict[str, Any]], where: str) -> Iterator[Message]:
    """What a user's turn holds: results of tools, each a message of its own, and what the user says."""
    if isinstance(content, str):
        yield Message(role="user", content=content)
        return
    said: list[str] = []
    for at, raw in enumerate(content):
        if raw.get("type") == "tool_result":
            block = read_fields(raw, ResultBlock, NEUTRAL_BLOCK, f"{where}[{at}]")
            found = block.content
            result = found if isinstance(found, str) else _texts(found, f"{where}[{at}].content")
            text = f"Error: {result}" if block.is_error else result
            yield Message(role="tool", content=text, tool_call_id=block.tool_use_id)
        else:
            said.append(_text(raw, f"{where}[{at}]"))
    if said or not content:
        yield Message(role="user", content="".join(said))


def _answered(content: str | list[dict[str, Any]], where: str) -> Message:
    if isinstance(content, str):
        return Message(role="assistant", content=content)
    said: list[str] = []
    calls: list[ToolCall] = []
    for at, raw in enumerate(content):
        if raw.get("type") == "tool_use":
            block = read_fields(raw, UseBlock, NEUTRAL_BLOCK, f"{where}[{at}]")
            calls.append(ToolCall(id=block.id, name=block.name, arguments=msgspec.json.encode(block.input).decode()))
        else:
            said.append(_text(raw, f"{where}[{at}]"))
    return Message(role="assistant", content="".join(said), tool_calls=tuple(calls))


def _texts(blocks: Sequence[dict[str, Any]], where: str) -> str:
    return "".join(_text(raw, f"{where}[{at}]") for at, raw in enumerate(blocks))


def _text(raw: dict[str, Any], where: str) -> str:
    if isinstance(raw.get("type"), str) and raw["type"] != "text":
        raise UnsupportedParameter("only text, tool_use and tool_result are supported here", param=f"{where}.type")
    return read_fields(raw, TextBlock, NEUTRAL_BLOCK, where).text


def _tools(raw: Sequence[dict[str, Any]]) -> tuple[Tool, ...]:
    if len(raw) > MAX_TOOLS:
        raise BadRequest(f"at most {MAX_TOOLS} tools", param="tools")
    return tuple(_tool(one, f"tools[{at}]") for at, one in enumerate(raw))


def _tool(raw: dict[str, Any], where: str) -> Tool:
    if raw.get("type") not in (None, "custom"):
        raise UnsupportedParameter("only tools of type custom are supported", param=f"{where}.type")
    body = read_fields(raw, ToolBody, NEUTRAL_TOOL, where)
    schema = msgspec.json.encode(body.input_schema).decode()
    try:
        return Tool(name=body.name, description=body.description or "", parameters=schema, strict=body.strict)
    except BadRequest as error:
        error.param = f"{where}.{'input_schema' if error.param == 'parameters' else error.param}"
        raise


def _choice(given: ChoiceBody | None) -> tuple[ToolChoice, tuple[str, ...], bool]:
    """The choice, the one tool that must be called, and whether several may be."""
    if given is None:
        return "auto", (), True
    choices: dict[str, ToolChoice] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
    if given.type not in choices or (given.type == "tool") != (given.name is not None):
        raise BadRequest("must be auto, any, none, or tool with a name", param="tool_choice")
    return choices[given.type], (given.name,) if given.name else (), not given.disable_parallel_tool_use


def _grammar(config: OutputConfig | None) -> Grammar | None:
    if config is None or config.format is None:
        return None
    if config.format.type != "json_schema":
        raise BadRequest("type must be json_schema", param="output_config.format.type")
    return json_grammar(config.format.schema, "output_config.format.schema")
