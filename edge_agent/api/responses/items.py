"""Input items of a Responses body as messages, and an answer as the messages that a next turn continues."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from edge_agent.api.gathered import Gathered
from shared.errors import BadRequest, UnsupportedParameter
from shared.openai import read_fields
from shared.schemas import Message, Role, ToolCall

ROLES: Mapping[str, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
MAX_ITEMS = 4096


class MessageItem(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[dict[str, Any]]
    type: str = "message"
    id: str = ""
    status: str = ""
    phase: str = ""


class CallItem(msgspec.Struct, kw_only=True):
    type: str
    call_id: str
    name: str
    arguments: str
    id: str = ""
    status: str = ""


class OutputItem(msgspec.Struct, kw_only=True):
    type: str
    call_id: str
    output: str | list[dict[str, Any]]
    id: str = ""
    status: str = ""
    name: str = ""


class TextPart(msgspec.Struct, kw_only=True):
    type: str
    text: str
    logprobs: list[Any] = []
    prompt_cache_breakpoint: dict[str, Any] | None = None


NEUTRAL_ITEM: Mapping[str, tuple[Any, ...]] = {"async": (False,), "caller": ({"type": "direct"},), "namespace": ()}
NEUTRAL_PART: Mapping[str, tuple[Any, ...]] = {"annotations": ([],)}


def read_items(given: str | list[dict[str, Any]]) -> tuple[Message, ...]:
    """Raises BadRequest naming the field. Calls join what the assistant said just before them."""
    if isinstance(given, str):
        return (Message(role="user", content=given),)
    if not 0 < len(given) <= MAX_ITEMS:
        raise BadRequest(f"input must have 1 to {MAX_ITEMS} items", param="input")
    messages: list[Message] = []
    for at, raw in enumerate(given):
        _add(messages, raw, f"input[{at}]")
    return tuple(messages)


def _add(messages: list[Message], raw: dict[str, Any], where: str) -> None:
    kind = raw.get("type", "message")
    if kind == "function_call":
        call = _call(raw, where)
        if messages and messages[-1].role == "assistant":
            last = messages.pop()
            messages.append(msgspec.structs.replace(last, tool_calls=(*last.tool_calls, call)))
        else:
            messages.append(Message(role="assistant", content="", tool_calls=(call,)))
    elif kind == "function_call_output":
        item = read_fields(raw, OutputItem, NEUTRAL_ITEM, where)
        messages.append(Message(role="tool", content=_text(item.output, f"{where}.output"), tool_call_id=item.call_id))
    elif kind == "message":
        said = read_fields(raw, MessageItem, NEUTRAL_ITEM, where)
        if said.role not in ROLES:
            raise BadRequest(f"role must be one of {', '.join(ROLES)}", param=f"{where}.role")
        messages.append(Message(role=ROLES[said.role], content=_text(said.content, f"{where}.content")))
    else:
        raise UnsupportedParameter(
            "only items of type message, function_call and function_call_output are supported", param=f"{where}.type"
        )


def _call(raw: dict[str, Any], where: str) -> ToolCall:
    item = read_fields(raw, CallItem, NEUTRAL_ITEM, where)
    try:
        msgspec.json.decode(item.arguments or "{}", type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadRequest("arguments must be a JSON object, as text", param=f"{where}.arguments") from error
    return ToolCall(id=item.call_id, name=item.name, arguments=item.arguments)


def _text(content: str | Sequence[dict[str, Any]], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for at, raw in enumerate(content):
        if raw.get("type") not in ("input_text", "output_text", "text"):
            raise UnsupportedParameter("only parts of text are supported", param=f"{where}[{at}].type")
        texts.append(read_fields(raw, TextPart, NEUTRAL_PART, f"{where}[{at}]").text)
    return "".join(texts)


def answered(gathered: Gathered) -> Message:
    """What the assistant said and called, for the next turn. A call that was cut short is none."""
    calls = tuple(ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in gathered.sound_calls)
    return Message(role="assistant", content=gathered.answer, tool_calls=calls)
