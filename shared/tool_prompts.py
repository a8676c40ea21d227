"""A conversation with tools as a chat template takes it, whether the template knows tools or not."""

from typing import Any

import msgspec

from shared.schemas import Message, Tool
from shared.tool_formats import ToolFormat, instructions, written


def prepared(
    messages: tuple[Message, ...], tools: tuple[Tool, ...], format_: ToolFormat, *, native: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages, and the tools for a template that has a place for them (`native`). Another one is given them in the
    words of a system message, with calls as the model would write them and their results as what a user says."""
    offered = [_tool(tool) for tool in tools]
    if native:
        return [_native(message) for message in messages], offered
    plain = [_in_words(message, format_) for message in messages]
    if tools:
        said = instructions(msgspec.json.encode([one["function"] for one in offered]).decode(), format_)
        if plain[0]["role"] == "system":
            plain[0] = plain[0] | {"content": f"{plain[0]['content']}\n\n{said}"}
        else:
            plain.insert(0, {"role": "system", "content": said})
    return plain, []


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": _decoded(tool.parameters)}
    return {"type": "function", "function": function}


def _native(message: Message) -> dict[str, Any]:
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    values |= {} if message.name is None else {"name": message.name}
    values |= {} if message.tool_call_id is None else {"tool_call_id": _id(message.tool_call_id)}
    if message.tool_calls:
        values["tool_calls"] = [
            {
                "id": _id(call.id),
                "type": "function",
                "function": {"name": call.name, "arguments": _decoded(call.arguments or "{}")},
            }
            for call in message.tool_calls
        ]
    return values


def _id(text: str) -> str:
    """Mistral's templates take an id of exactly nine letters and digits; to others it is all the same."""
    return "".join(char for char in text if char.isalnum() and char.isascii())[-9:].rjust(9, "0")


def _in_words(message: Message, format_: ToolFormat) -> dict[str, Any]:
    if message.role == "tool" and message.tool_call_id is not None:
        return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
    calls = [written(call.name, call.arguments or "{}", format_) for call in message.tool_calls]
    values = {"role": message.role, "content": "\n".join([*([message.content] if message.content else []), *calls])}
    return values if message.name is None else values | {"name": message.name}


def _decoded(text: str) -> Any:
    return msgspec.json.decode(text)
