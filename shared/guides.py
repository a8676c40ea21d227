"""Grammars: which tokens may come next. Compiled on a thread of their own, tried out in a process that can be killed.

A `Guide` follows one answer: it is told each token that was taken and gives the mask for the next. What it knows
follows from the output tokens alone, so preemption does not touch it. llguidance does the work: it computes masks as
they are needed, from derivatives and an Earley parser, so a grammar costs little before it is used; its limits bound
each step. A first trial in another process bounds what its limits do not.
"""

import json
import os
import select
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from shared import grammar_trial
from shared.errors import BadRequest, Overloaded, Source, UnsupportedParameter
from shared.grammars import JSON_SPACE
from shared.schemas import ChatRequest, Grammar
from shared.tool_formats import ToolFormat
from shared.tool_grammar import is_forced, tool_grammar

MAX_COMPILED = 64
LIMITS: dict[str, Any] = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
START_S = 60.0
TRIAL_S = 10.0
"""Of wall time, after which a trial is killed: generous, since the machine may be busy."""
COMPILE_S = 30.0
"""How long to wait for a guide, those before it in the queue included."""
MAX_COMPILING = 32


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a grammar needs to know of a model's tokens: the bytes of each, by id; which of them no text spells, so that
    only a grammar that names one permits it; which end an answer; and how the model spells a text."""

    pieces: Sequence[bytes]
    special: Collection[int]
    ends: Collection[int]
    tokenize: grammar_trial.Tokenize

    def described(self) -> dict[str, Any]:
        """As JSON can carry it; see `grammar_trial.read_tokenizer`."""
        pieces = [piece.decode("latin-1") for piece in self.pieces]
        return {"pieces": pieces, "special": sorted(self.special), "ends": sorted(self.ends)}

    def markers(self, format_: ToolFormat) -> dict[str, int]:
        """Those of a family's markers that are special tokens, by their spelling."""
        spelled = {self.pieces[token].decode(errors="replace"): token for token in self.special}
        return {text: spelled[text] for text in (*format_.starts, *format_.ends) if text in spelled}


class Guide:
    """One answer's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def failed(self) -> bool:
        """A limit was met: no token may follow, though the answer is not complete."""
        return bool(self._matcher.is_error())

    def mask(self) -> bytes:
        """The tokens that may come next: bit i % 8 of byte i // 8. Nothing after an error."""
        mask: bytes = self._matcher.compute_bitmask()
        return bytes(len(mask)) if self.failed else mask

    def take(self, token: int) -> bool:
        """The token was drawn; says whether the answer is complete, so that nothing else may follow."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped()) and not self.failed


class GrammarCompiler:
    """Grammar to Guide, remembering the latest. Owned by one thread. `source` is who refuses."""

    def __init__(self, vocabulary: Vocabulary, source: Source, *, trial_s: float = TRIAL_S) -> None:
        self._vocabulary, self._source = vocabulary, source
        self._trial = _Trial(vocabulary, source, trial_s)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar | str, LLMatcher] = OrderedDict()

    @property
    def trials(self) -> int:
        """Grammars tried out since the start."""
        return self._trial.count

    @property
    def remembered(self) -> int:
        return len(self._compiled)

    def guide(self, grammar: Grammar | str) -> Guide:
        """`grammar` is a caller's own, or what `tool_grammar` made of its tools. Raises BadRequest for what cannot be
        compiled within the limits; Overloaded if no trial can be held."""
        matcher = self._compiled.get(grammar) or self._compile(grammar)
        self._compiled[grammar] = matcher
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return Guide(matcher.deep_copy())

    def close(self) -> None:
        self._trial.kill()

    def _compile(self, grammar: Grammar | str) -> LLMatcher:
        param = "tools" if isinstance(grammar, str) else "grammar"
        if not self._vocabulary.ends:
            raise UnsupportedParameter(
                "this model has no token to end an answer with", param=param, source=self._source
            )
        text = _source(grammar)
        wrong = self._trial.run(text)
        if not wrong:
            self._tokenizer = self._tokenizer or grammar_trial.read_tokenizer(
                self._vocabulary.described(), self._vocabulary.tokenize
            )
            matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LLParserLimits(**LIMITS))
            if not matcher.is_error():
                return matcher
            wrong = "it is too complex"
        raise BadRequest(f"the grammar cannot be used: {_printable(wrong)}", param=param, source=self._source)


class Guides:
    """The guides of one server's answers, compiled one at a time on a thread of their own, for which so many may wait.
    May be used from any thread."""

    def __init__(self, vocabulary: Vocabulary, source: Source) -> None:
        self._vocabulary, self._source = vocabulary, source
        self._compiler = GrammarCompiler(vocabulary, source)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._places = threading.BoundedSemaphore(MAX_COMPILING)

    def guide(self, request: ChatRequest, format_: ToolFormat) -> "Future[Guide] | None":
        """What the answer must look like by its grammar or its tools; None if it is free. Raises Overloaded; the future
        raises it too, or BadRequest."""
        if request.grammar is None and not is_forced(request):
            return None
        if not self._places.acquire(blocking=False):
            raise Overloaded(
                f"{MAX_COMPILING} grammars are waiting to be compiled", source=self._source, retry_after=1.0
            )
        compiling = self._thread.submit(self._compile, request, format_)
        compiling.add_done_callback(lambda _: self._places.release())
        return compiling

    def _compile(self, request: ChatRequest, format_: ToolFormat) -> Guide:
        grammar = request.grammar or tool_grammar(request, format_, self._vocabulary.markers(format_))
        return self._compiler.guide(grammar)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._compiler.close()


class _Trial:
    """The process that tries grammars out. It is started when first needed, and again after it had to be killed."""

    def __init__(self, vocabulary: Vocabulary, source: Source, limit_s: float) -> None:
        self.count = 0
        self._vocabulary, self._source, self._limit_s = vocabulary, source, limit_s
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, source: str) -> str:
        """What is wrong with a grammar, or nothing."""
        self.count += 1
        process, limit_s = self._process, self._limit_s
        if process is None or process.poll() is not None:
            process, limit_s = self._start(), START_S + self._limit_s
        try:
            reply = _asked(process, source, limit_s)
        except OSError:
            reply = None
        if reply is None:
            self.kill()
            return "trying it out took too much time or memory"
        return reply

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:
                process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        self.kill()
        command = [sys.executable, "-I", str(Path(grammar_trial.__file__))]
        environment = {
            name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ
        }
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            self._process = process
            _tell(process, json.dumps(self._vocabulary.described() | {"limits": LIMITS}))
            if _asked(process, "start: /a/", START_S) != "":
                raise OSError("no trial could be held")
        except OSError as error:
            self.kill()
            raise Overloaded("grammars cannot be tried out now", source=self._source, retry_after=5.0) from error
        return process


def _tell(process: "subprocess.Popen[bytes]", line: str) -> None:
    if process.stdin is None:
        raise OSError("no pipe")
    process.stdin.write(line.encode() + b"\n")
    process.stdin.flush()


def _asked(process: "subprocess.Popen[bytes]", source: str, limit_s: float) -> str | None:
    """The reply to one grammar; None if there is none in time."""
    _tell(process, json.dumps(source))
    if process.stdout is None:
        return None
    ready, _, _ = select.select([process.stdout], [], [], limit_s)
    line = process.stdout.readline() if ready else b""
    return line.decode(errors="replace").strip() if line.endswith(b"\n") else None


def _source(grammar: Grammar | str) -> str:
    """The grammar as llguidance reads it."""
    if isinstance(grammar, str):
        return str(LLMatcher.grammar_from_lark(grammar))
    if grammar.syntax == "json_schema":
        source = LLMatcher.grammar_from_json_schema(
            grammar.text, overrides={"lenient": False, "whitespace_pattern": JSON_SPACE}
        )
    elif grammar.syntax == "regex":
        source = LLMatcher.grammar_from_regex(grammar.text)
    else:
        source = LLMatcher.grammar_from_lark(grammar.text)
    return str(source)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() and char.isascii() else "?" for char in text[:200])
