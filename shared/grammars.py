"""Grammars that callers bring: what is accepted of a JSON Schema, a regular expression and a Lark grammar.

A grammar is a program that a stranger sends. These checks cost time linear in its size and come before any library sees
it, so they hold for every backend alike; what runs the grammar has limits of its own. All raise BadRequest, whose
`param` is left to whoever knows which field it was.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from shared.errors import BadRequest

MAX_GRAMMAR_BYTES = 16 << 10
MAX_SCHEMA_DEPTH = 16
"""Schemas within schemas, references followed."""
MAX_JSON_DEPTH = 64
MAX_COUNT = 1 << 13
"""Of any length or number of items in a schema, and of all repetitions of a regular expression multiplied."""
MAX_NUMBER = 1e15
MAX_MULTIPLE = 1000
JSON_SPACE: Final = r" ?(\r?\n[ \t]{0,32})?"
"""Between two parts of a JSON text: a space, a line's end and its indentation. A small model that may write more spends
its answer on blank lines."""

_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems", "unevaluatedProperties", "not", "if", "then", "else")


def check_schema(text: str) -> None:
    """Refuse a JSON Schema that is too large, too deep, refers to itself or outside, or names no known type."""
    _check_size(text)
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest("the schema is not valid JSON") from error
    if not isinstance(schema, dict | bool):
        raise BadRequest("the schema must be an object")
    _check_nesting(schema)
    _Schema(schema).height(schema, 1)


def check_regex(text: str) -> None:
    """Refuse what repeats too often, or repeats without end what repeats without end itself, like `(a+)+`."""
    _check_size(text)
    scan = _Regex(text)
    scan.run()


def check_lark(text: str) -> None:
    """Refuse directives other than %ignore, and large repetition counts. What is inside is for the library's limits."""
    _check_size(text)
    for directive in re.findall(r"%\s*(\w+)", text):
        if directive != "ignore":
            raise BadRequest("a grammar may hold no directive but %ignore")
    counts = re.findall(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?", text)
    if any(_too_large(number) for found in counts for number in found if number):
        raise BadRequest(f"no count in a grammar may be over {MAX_COUNT}")


def _check_size(text: str) -> None:
    if not text:
        raise BadRequest("a grammar must not be empty")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_GRAMMAR_BYTES:
        raise BadRequest(f"a grammar must have at most {MAX_GRAMMAR_BYTES} bytes")


def _too_large(digits: str) -> bool:
    return len(digits) > 6 or int(digits) > MAX_COUNT


def _check_nesting(value: Any) -> None:
    """Of any JSON in it, so that what follows may recurse."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            return
    raise BadRequest(f"the schema is nested over {MAX_JSON_DEPTH} deep")


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


class _Schema:
    """One schema document. Every reference is followed once, so its cost is linear however often it is used."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._heights: dict[str, int | None] = {}
        """Of what a reference means; None while it is being looked at."""

    def height(self, schema: Any, depth: int) -> int:
        """How many schemas are nested below and including this one, which is at `depth`."""
        if depth > MAX_SCHEMA_DEPTH:
            raise BadRequest(f"the schema is nested over {MAX_SCHEMA_DEPTH} deep")
        if not isinstance(schema, dict):
            if isinstance(schema, bool):
                return 1
            raise BadRequest("a schema must be an object or a boolean")
        _check_keywords(schema)
        heights = [self.height(inner, depth + 1) for inner in _subschemas(schema)]
        if "$ref" in schema:
            heights.append(self._referred(schema["$ref"], depth + 1))
        height = 1 + max(heights, default=0)
        if depth + height - 1 > MAX_SCHEMA_DEPTH:
            raise BadRequest(f"the schema is nested over {MAX_SCHEMA_DEPTH} deep")
        return height

    def _referred(self, reference: Any, depth: int) -> int:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise BadRequest("$ref must point into the same schema, like #/$defs/name")
        if reference not in self._heights:
            self._heights[reference] = None
            self._heights[reference] = self.height(self._target(reference), depth)
        height = self._heights[reference]
        if height is None:
            raise BadRequest("$ref must not lead back to itself")
        return height

    def _target(self, reference: str) -> Any:
        at = self._root
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(at, dict) and name in at:
                at = at[name]
            elif isinstance(at, list) and name.isdecimal() and len(name) < 6 and int(name) < len(at):
                at = at[int(name)]
            else:
                raise BadRequest("$ref points nowhere")
        return at


def _subschemas(schema: Mapping[str, Any]) -> Iterator[Any]:
    for name in _MAPS:
        inner = schema.get(name, {})
        if not isinstance(inner, dict):
            raise BadRequest(f"{name} must be an object")
        yield from inner.values()
    for name in _LISTS:
        inner = schema.get(name, [])
        if not isinstance(inner, list):
            raise BadRequest(f"{name} must be a list")
        yield from inner
    for name in _SINGLE:
        if name in schema:
            inner = schema[name]
            yield from inner if isinstance(inner, list) and name == "items" else [inner]


def _check_keywords(schema: Mapping[str, Any]) -> None:
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not kinds or not all(isinstance(kind, str) and kind in _TYPES for kind in kinds):
            raise BadRequest(f"type must be one of {', '.join(sorted(_TYPES))}")
    for name in _COUNTS & schema.keys():
        if not _is_number(schema[name]) or not 0 <= schema[name] <= MAX_COUNT:
            raise BadRequest(f"{name} must be 0 to {MAX_COUNT}")
    for name in _NUMBERS & schema.keys():
        if not _is_number(schema[name]) or abs(schema[name]) > MAX_NUMBER:
            raise BadRequest(f"{name} must be a number of at most {MAX_NUMBER:g}")
    multiple = schema.get("multipleOf", 1)
    if not _is_number(multiple) or not 0.01 <= multiple <= MAX_MULTIPLE:
        raise BadRequest(f"multipleOf must be 0.01 to {MAX_MULTIPLE}")
    patterns = [schema["pattern"]] if "pattern" in schema else []
    named = schema.get("patternProperties")
    for pattern in [*patterns, *(named if isinstance(named, dict) else ())]:
        if not isinstance(pattern, str):
            raise BadRequest("pattern must be a string")
        if pattern:
            check_regex(pattern)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Branch:
    """One alternative of a group: what its items add up to."""

    def __init__(self) -> None:
        self.weight = 0
        self.loops = False
        """Something in it repeats without end,"""
        self.anchored = False
        """and something else must come each time, which tells the rounds of an outer repetition apart."""

    @property
    def ambiguous(self) -> bool:
        return self.loops and not self.anchored


class _Regex:
    """Reads a regular expression from left to right, once."""

    _COUNT = re.compile(r"\{(\d+)(,?)(\d*)\}")

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def run(self) -> None:
        self._group(0)
        if self._at < len(self._text):
            raise BadRequest("the regular expression closes a group that it did not open")

    def _group(self, depth: int) -> list[_Branch]:
        """The alternatives up to the end of the group, or of all."""
        if depth > MAX_JSON_DEPTH:
            raise BadRequest(f"the regular expression is nested over {MAX_JSON_DEPTH} deep")
        branches = [_Branch()]
        while self._at < len(self._text) and self._text[self._at] != ")":
            if self._text[self._at] == "|":
                self._at += 1
                branches.append(_Branch())
            else:
                self._item(branches[-1], depth)
        return branches

    def _item(self, into: _Branch, depth: int) -> None:
        inner = self._atom(depth)
        weight = max(1, sum(branch.weight for branch in inner))
        loops = any(branch.loops for branch in inner)
        least, times, endless = self._repeated()
        if endless and any(branch.ambiguous for branch in inner):
            raise BadRequest("the regular expression repeats without end what repeats without end itself")
        into.weight += weight * times
        if into.weight > MAX_COUNT:
            raise BadRequest(f"the regular expression repeats over {MAX_COUNT} times in all")
        into.loops = into.loops or loops or endless
        into.anchored = into.anchored or (least > 0 and not endless and (not loops or all(b.anchored for b in inner)))

    def _atom(self, depth: int) -> list[_Branch]:
        """One character, class or group."""
        char = self._text[self._at]
        if char == "(":
            self._at += 1
            inner = self._group(depth + 1)
            if self._at >= len(self._text):
                raise BadRequest("the regular expression does not close a group")
            self._at += 1
            return inner
        if char == "[":
            return self._class()
        self._at += 2 if char == "\\" else 1
        return [_Branch()]

    def _class(self) -> list[_Branch]:
        self._at += 2 if self._text[self._at + 1 : self._at + 2] == "^" else 1
        first = True
        while self._at < len(self._text) and (first or self._text[self._at] != "]"):
            self._at += 2 if self._text[self._at] == "\\" else 1
            first = False
        if self._at >= len(self._text):
            raise BadRequest("the regular expression does not close a class")
        self._at += 1
        return [_Branch()]

    def _repeated(self) -> tuple[int, int, bool]:
        """Times at least and at most (1 for each if there is no end), and whether there is none."""
        least, times, endless = 1, 1, False
        first = True
        while self._at < len(self._text):
            char = self._text[self._at]
            count = self._COUNT.match(self._text, self._at)
            if char not in "*+?" and not count:
                break
            if not first and char != "?":
                raise BadRequest("the regular expression repeats a repetition")
            self._at = count.end() if count else self._at + 1
            if first:
                least, times, endless = _quantified(char, count)
            first = False
        return least, times, endless


def _quantified(char: str, count: re.Match[str] | None) -> tuple[int, int, bool]:
    if count is None:
        return {"*": (0, 1, True), "+": (1, 1, True), "?": (0, 1, False)}[char]
    low, comma, high = count.groups()
    if _too_large(low) or (high and _too_large(high)):
        raise BadRequest(f"the regular expression repeats over {MAX_COUNT} times in all")
    return int(low), max(1, int(high or low)), bool(comma and not high)
