"""`tools`, `tool_choice` and earlier `tool_calls` of a chat body, as what a ChatRequest says of them."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from shared.bodies import ChatBody, FunctionBody, ToolCallBody, ToolChoiceBody
from shared.errors import BadRequest, UnsupportedParameter
from shared.schemas import MAX_TOOLS, Tool, ToolCall, ToolChoice


class ToolsAsked(NamedTuple):
    tools: tuple[Tool, ...]
    tool_choice: ToolChoice
    allowed_tools: tuple[str, ...]
    parallel_tool_calls: bool


_MODES: dict[str, ToolChoice] = {"none": "none", "auto": "auto", "required": "required"}


def read_tools(chat: ChatBody) -> ToolsAsked:
    """Raises BadRequest naming the field. Without tools the other fields mean nothing, and become what they are when
    left out."""
    if len(chat.tools) > MAX_TOOLS:
        raise BadRequest(f"at most {MAX_TOOLS} tools", param="tools")
    tools = tuple(read_tool(one.function, one.type, f"tools[{at}]") for at, one in enumerate(chat.tools))
    choice, allowed = _choice(chat.tool_choice)
    if not tools and choice != "required":
        return ToolsAsked((), "auto", (), True)
    return ToolsAsked(tools, choice, allowed, chat.parallel_tool_calls)


def read_calls(calls: Sequence[ToolCallBody], where: str) -> tuple[ToolCall, ...]:
    for at, call in enumerate(calls):
        if call.type != "function":
            raise UnsupportedParameter("only functions can be called", param=f"{where}.tool_calls[{at}].type")
        _check_arguments(call.function.arguments, f"{where}.tool_calls[{at}].function.arguments")
    return tuple(ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments) for call in calls)


def _check_arguments(text: str, param: str) -> None:
    try:
        msgspec.json.decode(text or "{}", type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadRequest("arguments must be a JSON object, as text", param=param) from error


def read_tool(function: FunctionBody | None, kind: str, where: str) -> Tool:
    if kind != "function" or function is None:
        raise UnsupportedParameter("only tools of type function are supported", param=f"{where}.type")
    given = {} if function.parameters is None else {"parameters": msgspec.json.encode(function.parameters).decode()}
    try:
        return Tool(name=function.name, description=function.description or "", strict=bool(function.strict), **given)
    except BadRequest as error:
        error.param = f"{where}.function.{error.param}"
        raise


def _choice(given: str | ToolChoiceBody) -> tuple[ToolChoice, tuple[str, ...]]:
    if isinstance(given, str):
        if given in _MODES:
            return _MODES[given], ()
    elif given.type == "function" and given.function is not None:
        return "required", (given.function.name,)
    elif given.type == "allowed_tools" and given.allowed_tools is not None:
        names = tuple(one.function.name for one in given.allowed_tools.tools if one.function is not None)
        if names and given.allowed_tools.mode in ("auto", "required"):
            return _MODES[given.allowed_tools.mode], names
    raise BadRequest("must be none, auto, required, a function or allowed_tools", param="tool_choice")
