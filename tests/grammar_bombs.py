"""Grammars that no server of ours may take, as one table: each with the field of a chat body that it is in."""

from typing import Any


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def _brackets(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _chain(length: int) -> dict[str, Any]:
    """References that lead on to the next, each used twice."""
    links = {f"l{at}": {"anyOf": [{"$ref": f"#/$defs/l{at + 1}"}] * 2} for at in range(length)}
    return {"$defs": links | {f"l{length}": {"type": "string"}}, "$ref": "#/$defs/l0"}


SCHEMAS: dict[str, Any] = {
    "nested too deeply": _nested(17),
    "nested JSON": {"const": _brackets(70)},
    "deep by reference": _chain(16),
    "refers to itself": {"$ref": "#"},
    "refers to itself around a corner": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"items": {"$ref": "#/$defs/a"}}},
        "$ref": "#/$defs/a",
    },
    "recursive tree": {"properties": {"child": {"$ref": "#"}}},
    "refers elsewhere": {"$ref": "http://169.254.169.254/schema.json"},
    "refers to a file": {"$ref": "file:///etc/passwd"},
    "refers to nothing": {"$ref": "#/$defs/none"},
    "reference a number": {"$ref": 1},
    "huge enum": {"enum": [f"value-{at}" for at in range(2_000)]},
    "10 MB": {"enum": ["x" * 2_000_000]},
    "unknown type": {"type": "strin"},
    "type a number": {"type": 3},
    "no types": {"type": []},
    "pattern with nested loops": {"type": "string", "pattern": "^(a+)+$"},
    "pattern of a property": {"patternProperties": {"(a*)*b": {}}},
    "pattern of a property below": {"properties": {"a": {"items": {"pattern": "(x*)+"}}}},
    "pattern a number": {"pattern": 1},
    "huge length": {"type": "string", "maxLength": 10**9},
    "huge array": {"type": "array", "minItems": 10**6},
    "negative length": {"minLength": -1},
    "length true": {"minLength": True},
    "huge range": {"type": "integer", "maximum": 10**300},
    "huge multiple": {"type": "integer", "multipleOf": 99_999_999},
    "no multiple": {"multipleOf": 0},
    "properties a list": {"properties": []},
    "anyOf an object": {"anyOf": {}},
    "items a number": {"items": 1},
}
REGEXES = {
    "nested loops": "(a+)+$",
    "nested loops, deeper": "((a+)b?)*c",
    "nested loops, one of several": "(b|a*)+",
    "repeated repetition": "a+*",
    "million times": "a{1000000}",
    "thousand times thousand": "((a{0,100}){0,100}){0,100}",
    "many digits": "a{" + "9" * 4000 + "}",
    "deep": "(" * 200 + "a" + ")" * 200,
    "never closed": "(a",
    "never opened": "a)",
    "class never closed": "[a",
    "long": "a" * 20_000,
    "empty": "",
}
LARKS = {
    "directive": 'start: x\nx: %json {"type": "string"}',
    "options": '%llguidance {}\nstart: "a"',
    "million times": 'start: "a"{1000000}',
    "million times, tilde": 'start: "a"~1..1000000',
    "long": "start: " + '"a" ' * 10_000,
    "empty": "",
}
ALL: list[tuple[str, str, dict[str, Any]]] = [
    *(
        (
            f"schema {name}",
            "response_format.json_schema.schema",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
        )
        for name, schema in SCHEMAS.items()
    ),
    *(
        (f"regex {name}", "structured_outputs.regex", {"structured_outputs": {"regex": text}})
        for name, text in REGEXES.items()
    ),
    *(
        (f"lark {name}", "structured_outputs.grammar", {"structured_outputs": {"grammar": text}})
        for name, text in LARKS.items()
    ),
    ("huge choice", "structured_outputs.choice", {"structured_outputs": {"choice": ["x"] * 100_000}}),
    ("empty choice", "structured_outputs.choice", {"structured_outputs": {"choice": ["a", ""]}}),
    ("two grammars", "structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
    ("no grammar", "structured_outputs", {"structured_outputs": {}}),
    ("unknown grammar", "structured_outputs.zap", {"structured_outputs": {"zap": 1}}),
    (
        "grammar twice",
        "structured_outputs",
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
    ),
    ("unknown format", "response_format.type", {"response_format": {"type": "xml"}}),
    ("schema missing", "response_format.json_schema", {"response_format": {"type": "json_schema"}}),
]
