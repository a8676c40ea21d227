"""`response_format` and `structured_outputs` of a request body, as the one Grammar that an answer must follow."""

import re
from collections.abc import Callable

import msgspec

from shared.bodies import ResponseFormat, StructuredOutputs
from shared.errors import BadRequest
from shared.schemas import Grammar, Syntax

ANY_OBJECT = '{"type":"object"}'
MAX_CHOICES = 1024


def read_grammar(format_: ResponseFormat | None, outputs: StructuredOutputs | None) -> Grammar | None:
    """Raises BadRequest naming the field: a bad grammar, two of them, or none where one is announced."""
    one = _of_format(format_) if format_ is not None else None
    other = _of_outputs(outputs) if outputs is not None else None
    if one is not None and other is not None:
        raise BadRequest("give response_format or structured_outputs, not both", param="structured_outputs")
    return one or other


def json_grammar(schema: object, param: str) -> Grammar:
    """The grammar of a JSON Schema that was itself given as JSON."""
    return grammar("json_schema", msgspec.json.encode(schema).decode(), param)


def grammar(syntax: Syntax, text: str, param: str) -> Grammar:
    try:
        return Grammar(syntax=syntax, text=text)
    except BadRequest as error:
        error.param = param
        raise


def _of_format(given: ResponseFormat) -> Grammar | None:
    if given.type == "text":
        return None
    if given.type == "json_object":
        return Grammar(syntax="json_schema", text=ANY_OBJECT)
    if given.type != "json_schema":
        raise BadRequest("type must be text, json_object or json_schema", param="response_format.type")
    if given.json_schema is None or given.json_schema.schema is None:
        raise BadRequest("json_schema needs a schema", param="response_format.json_schema")
    return json_grammar(given.json_schema.schema, "response_format.json_schema.schema")


def _of_outputs(given: StructuredOutputs) -> Grammar:
    readers: dict[str, Callable[[], Grammar]] = {
        "json": lambda: _json(given),
        "regex": lambda: grammar("regex", given.regex or "", "structured_outputs.regex"),
        "choice": lambda: _choice(given.choice or []),
        "grammar": lambda: grammar("lark", given.grammar or "", "structured_outputs.grammar"),
        "json_object": lambda: Grammar(syntax="json_schema", text=ANY_OBJECT),
    }
    names = [name for name in readers if getattr(given, name) not in (None, False)]
    if len(names) != 1:
        raise BadRequest(f"give exactly one of {', '.join(readers)}", param="structured_outputs")
    return readers[names[0]]()


def _json(given: StructuredOutputs) -> Grammar:
    param = "structured_outputs.json"
    if isinstance(given.json, str):
        return grammar("json_schema", given.json, param)
    return json_grammar(given.json, param)


def _choice(choices: list[str]) -> Grammar:
    param = "structured_outputs.choice"
    if not 0 < len(choices) <= MAX_CHOICES or not all(choices):
        raise BadRequest(f"choice must have 1 to {MAX_CHOICES} texts, none empty", param=param)
    return grammar("regex", "|".join(map(_literal, choices)), param)


def _literal(text: str) -> str:
    """A regular expression for exactly this text: unlike re.escape, it escapes nothing that has no meaning."""
    return re.sub(r"([][\\.^$*+?{}()|/&~#-])", r"\\\1", text)
