"""A policy's text as plain values, each with its line: a small and strict part of YAML.

Maps with unique text keys, lists, text, whole and decimal numbers, true and false. Refused by name: tags, anchors and
aliases, null, infinities, a second document, deep nesting, large files. Scalars follow YAML 1.2's core schema, so
`on`, `no` and `12:30` are text. Built on PyYAML's event stream, which neither constructs objects nor recurses.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import yaml

from shared.errors import BadRequest

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 16
MAX_VALUES: Final = 20_000  # read in under a second, where 256 KiB of `1,1,1` would take four
MAX_INT_DIGITS: Final = 18

_HINTS: Final = {
    r"'\t'": ": indent with spaces",
    "mapping values are not allowed": ": indented more than the line above, or a `: ` in text without quotes",
}

Value = str | int | float | bool | tuple["Value", ...] | dict[str, "Value"]
Path = tuple[str | int, ...]
Mark = tuple[int, int]
"""Line and column, from 1."""
TOP: Final[Mark] = (1, 1)

_FIELD: Final = re.compile(r"([A-Za-z_]\w{0,63}) *:")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")  # which an escape can write
_NULL: Final = re.compile(r"~|null|Null|NULL|")
_BOOL: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT: Final = re.compile(r"[-+]?[0-9]+")
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE: Final = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One fault of a policy. `line` and `column` count from 1; `field` reads like `rules[2].when.prompt_tokens`."""

    line: int
    column: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.line}: {self.field + ': ' if self.field else ''}{self.message}"


class InvalidPolicy(BadRequest):
    """`policy.yaml:12: rules[2].when.prompt_tokens: ...`, the first problem; `problems` has them all, by line."""

    code: ClassVar[str] = "invalid_policy"

    def __init__(self, name: str, problems: tuple[Problem, ...]) -> None:
        self.name = name
        self.problems = problems
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{name}:{problems[0]}{more}", param=problems[0].field or None)

    @property
    def line(self) -> int:
        return self.problems[0].line

    @property
    def column(self) -> int:
        return self.problems[0].column

    @property
    def field(self) -> str:
        return self.problems[0].field


@dataclass(frozen=True, slots=True)
class Document:
    value: Value
    marks: dict[Path, Mark]
    """Where every value stands: its key, or itself in a list."""

    def nearest(self, path: Path) -> Path:
        """The longest part of `path` that was written; the root always was."""
        while path not in self.marks:
            path = path[:-1]
        return path

    def problem(self, path: Path, message: str) -> Problem:
        """A problem with `path`, marked where it stands or, if it is absent, where its nearest parent does."""
        return Problem(*self.marks[self.nearest(path)], spell(path), message)


def read(source: str | bytes, *, name: str) -> Document:
    """Raises InvalidPolicy, and nothing else, whatever the source holds."""
    try:
        return _Reader(_events(_decoded(source))).document()
    except _Fault as fault:
        raise InvalidPolicy(name, (fault.problem,)) from None


def spell(path: Path) -> str:
    """('rules', 2, 'when') -> 'rules[2].when'."""
    parts = (f"[{step}]" if isinstance(step, int) else f".{shorten(step)}" for step in path)
    return "".join(parts).removeprefix(".")


def shorten(text: str, limit: int = 60) -> str:
    """Printable ASCII on one line, whatever was written."""
    escaped = ascii(text)[1:-1]
    return escaped if len(escaped) <= limit else f"{escaped[:limit]}..."


class _Fault(Exception):
    def __init__(self, mark: Mark, message: str, path: Path = ()) -> None:
        super().__init__(message)
        self.problem = Problem(*mark, spell(path), message)


def _decoded(source: str | bytes) -> str:
    if len(source) > MAX_BYTES:
        mark, path = _bulk(source[:MAX_BYTES])
        raise _Fault(mark, f"larger than {MAX_BYTES // 1024} KiB", path)
    if isinstance(source, str):
        return source
    try:
        return source.decode()
    except UnicodeDecodeError as error:
        raise _Fault((source.count(b"\n", 0, error.start) + 1, 1), "not UTF-8 text") from None


def _bulk(source: str | bytes) -> tuple[Mark, Path]:
    """The field, and where it begins, that takes more than half of a text too large to be read; else its top."""
    lines = (source if isinstance(source, str) else source.decode(errors="replace")).split("\n")
    sizes: dict[str, int] = {}
    begins: dict[str, Mark] = {}
    field = ""
    for number, line in enumerate(lines, 1):
        if found := _FIELD.match(line):
            field = found[1]
            begins.setdefault(field, (number, 1))
        if not line.lstrip().startswith("#"):
            sizes[field] = sizes.get(field, 0) + len(line) + 1
    most = max(sizes, key=sizes.__getitem__, default="")
    return (begins[most], (most,)) if most and sizes[most] * 2 > len(source) else (TOP, ())


def _events(text: str) -> Iterator[yaml.Event]:
    try:
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        hint = next((hint for what, hint in _HINTS.items() if what in said), "")
        mark = _mark(error.problem_mark or error.context_mark)
        raise _Fault(mark, f"not YAML: {shorten(said, 200)}{hint}") from None
    except yaml.reader.ReaderError as error:
        what = f"a character that YAML does not allow: {shorten(text[error.position])}"
        raise _Fault((text.count("\n", 0, error.position) + 1, 1), what) from None
    except (yaml.YAMLError, ValueError, OverflowError):  # an escape beyond Unicode, a version of 5,000 digits
        raise _Fault(TOP, "not YAML") from None


def _fault(event: yaml.Event, message: str, path: Path = ()) -> _Fault:
    return _Fault(_mark(event.start_mark), message, path)


def _mark(mark: Any) -> Mark:
    """Of PyYAML's mark, which counts from 0, or of None."""
    return (mark.line + 1, mark.column + 1) if mark else TOP


class _Reader:
    """Recursive descent over the events; MAX_DEPTH bounds the recursion."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._marks: dict[Path, Mark] = {}

    def document(self) -> Document:
        next(self._events)  # the stream's start
        start = next(self._events)
        if isinstance(start, yaml.StreamEndEvent):
            raise _Fault(TOP, "empty")
        event = next(self._events)
        self._marks[()] = _mark(event.start_mark)
        value = self._value((), event)
        next(self._events)  # the document's end
        after = next(self._events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise _fault(after, "only one document is allowed")
        return Document(value, self._marks)

    def _value(self, path: Path, event: yaml.Event) -> Value:
        _refuse_extras(path, event)
        if len(self._marks) > MAX_VALUES:
            raise _fault(event, f"more than {MAX_VALUES} values", path)
        if len(path) > MAX_DEPTH:
            raise _fault(event, f"nested more than {MAX_DEPTH} deep", path[:4])
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        return _scalar(path, event)

    def _mapping(self, path: Path) -> dict[str, Value]:
        found: dict[str, Value] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            _refuse_extras(path, event)
            if not isinstance(event, yaml.ScalarEvent):
                raise _fault(event, "a key must be text", path)
            key = event.value
            if key in found:
                raise _fault(event, "written twice", (*path, key))
            self._marks[*path, key] = _mark(event.start_mark)
            found[key] = self._value((*path, key), next(self._events))
        return found

    def _sequence(self, path: Path) -> tuple[Value, ...]:
        found: list[Value] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            here = (*path, len(found))
            self._marks[here] = _mark(event.start_mark)
            found.append(self._value(here, event))
        return tuple(found)


def _refuse_extras(path: Path, event: yaml.Event) -> None:
    """Of YAML's extras, aliases are the worst: nine lines of them can mean a billion values."""
    if isinstance(event, yaml.NodeEvent) and event.anchor is not None:  # as an alias has, too
        raise _fault(event, "anchors and aliases are not allowed", path)
    if getattr(event, "tag", None) is not None:
        raise _fault(event, "tags are not allowed", path)
    if isinstance(event, yaml.ScalarEvent) and _SURROGATE.search(event.value):
        raise _fault(event, "half a surrogate pair is no character", path)


def _scalar(path: Path, event: Any) -> Value:
    text: str = event.value
    if event.style is not None:  # quoted or a block: text, whatever it looks like
        return text
    if _NULL.fullmatch(text):
        raise _fault(event, "a value is missing", path)
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        if len(text.lstrip("+-")) > MAX_INT_DIGITS:
            raise _fault(event, f"a number of more than {MAX_INT_DIGITS} digits", path)
        return int(text)
    number = _FLOAT.fullmatch(text) and float(text)
    if _NOT_FINITE.fullmatch(text) or (number is not None and not math.isfinite(number)):
        raise _fault(event, "not a finite number", path)
    return text if number is None else number
