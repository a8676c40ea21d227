"""How model families write a call of a tool, and reading calls while they are being written.

`format_of` knows a family by its chat template. A `ToolReader` takes the text of an answer as it comes and separates
what is said from what is called: the name first, then pieces of the arguments. No part of a marker is ever shown, and
what turns out to be no call of an offered tool is given back as the text it is. Pure: no I/O, nothing is evaluated.
"""

import ast
import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shared.schemas import ToolPiece
from shared.stops import overlap

MAX_CALLS = 128
MAX_HELD = 64 << 10
"""Characters that are held back while they might become a call."""
MAX_HEAD = 512


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """`starts` are markers before calls, `ends` those after. `bare`: an answer may be a call without any. `named`:
    `name[ARGS]{...}` is a call too. `pythonic`: so is `name(key=value)`. `key` is what we call the arguments."""

    name: str
    starts: tuple[str, ...]
    ends: tuple[str, ...] = ()
    bare: bool = False
    named: bool = False
    pythonic: bool = False
    key: str = "arguments"

    @property
    def markers(self) -> tuple[str, ...]:
        """All that may be a token of its own."""
        return (*self.starts, *self.ends, *(("[ARGS]", "[CALL_ID]") if self.named else ()))


HERMES = ToolFormat("hermes", ("<tool_call>",), ("</tool_call>",))
LLAMA = ToolFormat("llama", ("<|python_tag|>",), ("<|eom_id|>",), bare=True, key="parameters")
MISTRAL = ToolFormat("mistral", ("[TOOL_CALLS]",), named=True)
GEMMA = ToolFormat("gemma", ("```tool_call", "```tool_code", "```json"), ("```",), bare=True, pythonic=True)


def format_of(template: str) -> ToolFormat:
    """By what a chat template writes. A model whose template knows no tools is told of a form in words."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or "<|start_header_id|>" in template:
        return LLAMA
    return GEMMA if "<start_of_turn>" in template else HERMES


def instructions(tools: str, format_: ToolFormat) -> str:
    """What a model is told whose template has no place for tools. `tools` is a JSON list."""
    form = written("<name>", "<object>", format_)
    return f"You can call these functions:\n<tools>{tools}</tools>\nTo call one, answer in this form alone:\n{form}"


def written(name: str, arguments: str, format_: ToolFormat) -> str:
    """A call as a model of this family writes it, in JSON."""
    end = f"\n{format_.ends[0]}" if format_.ends and not format_.bare else "\n```" if format_.pythonic else ""
    return f'{format_.starts[0]}\n{{"name": {json.dumps(name)}, "{format_.key}": {arguments}}}{end}'


_HEAD = re.compile(r'[\s\[,;]*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")


_PYTHONIC = re.compile(r"\s*\[?\s*[A-Za-z_]\w*\s*\(")


class _End:
    """Finds where a JSON value ends, looking at each character once."""

    _SPECIAL = re.compile(r'[\\"{}\[\]]')

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._quoted, self._skip, self.at = depth, False, False, 0

    def find(self, text: str) -> int | None:
        """Just after the last bracket, in a text that only grew since the last call; None if it is yet to come."""
        if self._skip and self.at < len(text):
            self.at, self._skip = self.at + 1, False
        while found := self._SPECIAL.search(text, self.at):
            self.at = found.end()
            if found[0] == "\\":
                if self._quoted:
                    self._skip = self.at == len(text)
                    self.at += not self._skip
            elif found[0] == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += 1 if found[0] in "{[" else -1
                if self._depth <= 0:
                    return self.at
        self.at = len(text)
        return None


class ToolReader:
    """`push` text, `flush` at the end; both give what may be shown and what was called. `names` are the tools that were
    offered; `seed` makes the calls' ids, which are the same if the same answer is read again."""

    def __init__(self, format_: ToolFormat, names: Collection[str], seed: str, *, parallel: bool = True) -> None:
        self._format, self._names, self._seed = format_, frozenset(names), seed
        self._limit = MAX_CALLS if parallel else 1
        self._mode = self._text
        self._buffer, self._marker, self._final = "", "", False
        self._begun = not format_.bare
        self._wrapped = False
        self._end = _End()
        self._shown: list[str] = []
        self._pieces: list[ToolPiece] = []
        self.calls = 0

    @property
    def done(self) -> bool:
        """One call was all that was wanted, and it is complete."""
        return self._limit == self.calls == 1 and self._mode == self._between

    def push(self, text: str) -> tuple[str, tuple[ToolPiece, ...]]:
        self._buffer += text
        while self._mode():
            pass
        shown, pieces = "".join(self._shown), tuple(self._pieces)
        self._shown, self._pieces = [], []
        return shown, pieces

    def flush(self) -> tuple[str, tuple[ToolPiece, ...]]:
        """The end. What might have become a call is text after all, unless its name was said already."""
        self._final = True
        return self.push("")

    # Each mode looks at the buffer, and says whether there is more to be done with it.

    def _text(self) -> bool:
        if not self._begun:
            first = self._buffer.lstrip()[:1]
            if not first and not self._final:
                return False
            self._begun = True
            if first in ("{", "["):
                return self._open("", 0)
        found = [(at, start) for start in self._format.starts if (at := self._buffer.find(start)) >= 0]
        if found:
            at, start = min(found)
            self._shown.append(self._buffer[:at])
            return self._open(start, at + len(start))
        kept = 0 if self._final else max(overlap(self._buffer, start) for start in self._format.starts)
        cut = len(self._buffer) - kept
        self._shown.append(self._buffer[:cut])
        self._buffer = self._buffer[cut:]
        return False

    def _open(self, marker: str, cut: int) -> bool:
        self._marker, self._buffer, self._mode, self._end = marker, self._buffer[cut:], self._head, _End()
        return True

    def _give_back(self) -> bool:
        """It is no call: show the marker, and look at what follows it as at any text."""
        self._shown.append(self._marker)
        self._mode = self._text
        return True

    def _head(self) -> bool:
        if self.calls >= self._limit:
            return self._give_back()
        start = self._buffer[:MAX_HEAD]
        match, self._wrapped = _HEAD.match(start), True
        if match is None and self._format.named:
            match, self._wrapped = _NAMED.match(start), False
        if match is not None and match[1] in self._names:
            self._call(match[1])
            self._buffer, self._mode, self._end = self._buffer[match.end() :], self._arguments, _End()
            return True
        return self._whole()

    def _whole(self) -> bool:
        """A call that cannot be streamed: its keys are in another order, or it is written like Python."""
        body = self._buffer.lstrip()
        opened = body.lstrip("[,; \n\t")
        likely = not body or not opened or opened[0] == "{" or self._format.named or self._format.pythonic
        too_much = self._final or len(self._buffer) > MAX_HELD
        end = self._span()
        calls = [] if end is None else _calls_in(self._buffer[:end], self._names, pythonic=self._format.pythonic)
        if calls:
            for name, arguments in calls[: self._limit - self.calls]:
                self._call(name)
                self._pieces.append(ToolPiece(index=self.calls - 1, arguments=arguments))
            self._buffer, self._mode = self._buffer[end:], self._between
            return True
        if not likely or too_much or end is not None:
            return self._give_back()
        return False

    def _span(self) -> int | None:
        """Where what might be a call is complete."""
        if self._format.pythonic and self._marker:
            at = self._buffer.find(self._format.ends[0])
            return at if at >= 0 else len(self._buffer) if self._final else None
        like_python = self._format.pythonic and _PYTHONIC.match(self._buffer)
        if like_python or self._buffer.lstrip()[:1] not in ("{", "[", ",", ";"):
            return len(self._buffer) if self._final or (len(self._buffer) > MAX_HEAD and not like_python) else None
        return self._end.find(self._buffer)

    def _call(self, name: str) -> None:
        digest = hashlib.sha256(f"{self._seed}/{self.calls}".encode()).hexdigest()
        self._pieces.append(ToolPiece(index=self.calls, id=f"call_{digest[:24]}", name=name))
        self.calls += 1

    def _arguments(self) -> bool:
        end = self._end.find(self._buffer)
        piece = self._buffer if end is None else self._buffer[:end]
        if piece:
            self._pieces.append(ToolPiece(index=self.calls - 1, arguments=piece))
        self._buffer = self._buffer[len(piece) :]
        if end is None:
            self._end.at -= len(piece)
            return False
        self._mode, self._end = (self._tail, _End(1)) if self._wrapped else (self._between, _End())
        return True

    def _tail(self) -> bool:
        """What is left of the object around the arguments."""
        end = self._end.find(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is None:
            self._end.at = 0
            return False
        self._mode = self._between
        return True

    def _between(self) -> bool:
        """After a call: another one, an end marker, or text again."""
        rest = self._buffer = self._buffer.lstrip()
        if not rest:
            return False
        if rest[0] in ",;]":
            self._buffer = rest[1:]
            return rest[0] == "]" or self._open(rest[0], 0)
        markers = (*self._format.ends, *self._format.starts)
        ended = next((end for end in self._format.ends if rest.startswith(end)), None)
        if ended is None and not self._final and any(marker.startswith(rest) for marker in markers):
            return False
        self._buffer = rest[len(ended or "") :]
        self._mode = self._text
        return True


def _calls_in(text: str, names: Collection[str], *, pythonic: bool) -> list[tuple[str, str]]:
    """Names and arguments of the calls that a complete text is; none if any part of it is something else."""
    try:
        value = json.loads(text.lstrip(" \n\t,;"))
    except (ValueError, RecursionError):
        return _python_calls(text.strip(), names) if pythonic else []
    found = [_call_of(one, names) for one in (value if isinstance(value, list) else [value])]
    calls = [call for call in found if call is not None]
    return calls if len(calls) == len(found) else []


def _call_of(value: object, names: Collection[str]) -> tuple[str, str] | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return value["name"], arguments
    return (value["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None


def _python_calls(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """`f(a=1)` or a list of such. Parsed, never run: arguments must be literals."""
    try:
        tree = ast.parse(text, mode="eval").body
        nodes: Sequence[ast.expr] = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
        return [_python_call(node, names) for node in nodes]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []


def _python_call(node: ast.expr, names: Collection[str]) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name) or node.func.id not in names:
        raise ValueError
    pairs = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
    if None in pairs:
        raise ValueError
    return node.func.id, json.dumps(pairs)
