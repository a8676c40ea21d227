"""The grammar of an answer that has to call a tool, or whose calls have to follow their schemas.

Lark's notation as llguidance reads it. A marker that is a token of its own is written as that token (`<[id]>`), since
no text spells it; the schemas were checked when they came (`shared.grammars`).
"""

import json
from collections.abc import Mapping

from shared.grammars import JSON_SPACE
from shared.schemas import ChatRequest, Tool
from shared.tool_formats import ToolFormat


def is_forced(request: ChatRequest) -> bool:
    """False if the answer is free: it may call nothing, or may call and no tool is strict."""
    return any(request.tool_choice == "required" or tool.strict for tool in request.calling)


def tool_grammar(request: ChatRequest, format_: ToolFormat, markers: Mapping[str, int]) -> str:
    """Of an answer that is not free. `markers` are the family's that are tokens of their own."""
    tools = request.calling
    required = request.tool_choice == "required"
    start = format_.starts[0]
    end = format_.ends[0] if format_.ends and (not format_.bare or format_.pythonic) else ""
    several = "call+" if request.parallel_tool_calls else "call"
    lines = [
        f"calls: {several}",
        f"call: {_marker(start, markers)} inner",
        f"inner: WS body WS {_marker(end, markers)}",
    ]
    if required:
        lines.insert(0, "start: calls")
    elif start in markers:
        lines[:0] = ["start: (said call)* TEXT", "said: TEXT"]
    else:
        lines[:0] = ["start: (told inner)* TEXT", f"told[lazy]: TEXT {_text(start)}"]
    lines += ["WS: /[ \\n]{0,2}/", "TEXT: /(.|\\n)*/", "body: " + " | ".join(f"tool_{at}" for at in range(len(tools)))]
    strict = required or any(tool.strict for tool in tools)
    lines += [_rule(at, tool, format_, strict=tool.strict or required) for at, tool in enumerate(tools) if strict]
    return "\n".join(lines)


def _rule(at: int, tool: Tool, format_: ToolFormat, *, strict: bool) -> str:
    head = f'{{"name": {json.dumps(tool.name)}, "{format_.key}": '
    schema = json.loads(tool.parameters) if strict else {"type": "object"}
    if isinstance(schema, dict):
        schema = {"type": "object"} | schema | {"x-guidance": {"whitespace_pattern": JSON_SPACE}}
    return f"tool_{at}: {_text(head)} args_{at} {_text('}')}\nargs_{at}: %json {json.dumps(schema)}"


def _marker(text: str, markers: Mapping[str, int]) -> str:
    return f"<[{markers[text]}]>" if text in markers else _text(text)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else '""'
