"""Tries grammars out, in a process of its own that may be killed: `python grammar_trial.py`, started by `guides.py`.

Reads JSON lines. The first describes the vocabulary (see `read_tokenizer`) and has `limits`; each later one is a
grammar as llguidance reads it. Each is answered by one line: empty if the grammar compiles and gives masks quickly at
some of its states, else what is wrong. Imports nothing of ours, so that it starts quickly and holds no model.
"""

import contextlib
import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MEMORY_BYTES = 4 << 30
COMPILE_S = 1.0
MASK_S = 0.1
"""Processor time for one state's mask: everybody's next token waits for it."""
WALKS, STEPS = 2, 24
ALARM_S = 60
"""Who started this process kills it sooner; if that one is gone, the signal does."""

Tokenize = Callable[[str], Iterable[int]]


class _Tokens:
    """A vocabulary as llguidance takes one. It asks how text that must follow is spelled in tokens; an answer in other
    bytes would leave nothing that may follow, so what `tokenize` changes is spelled piece by piece, longest first."""

    bos_token_id = None

    def __init__(self, told: dict[str, Any], tokenize: Tokenize | None) -> None:
        self.tokens = [piece.encode("latin-1") for piece in told["pieces"]]
        self.special_token_ids = told["special"]
        self.eos_token_id = told["ends"][0]
        self._hidden = set(told["special"])
        self._ids = {piece: token for token, piece in enumerate(self.tokens) if piece and token not in self._hidden}
        self._longest = max(map(len, self._ids), default=0)
        self._tokenize = tokenize

    def __call__(self, text: bytes) -> list[int]:
        if self._tokenize is not None:
            ids = [int(token) for token in self._tokenize(text.decode(errors="replace"))]
            if self._hidden.isdisjoint(ids) and b"".join(self.tokens[token] for token in ids) == text:
                return ids
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        ids, at = list[int](), 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._ids), None)
            if size is None:
                break
            ids.append(self._ids[text[at : at + size]])
            at += size
        return ids


def read_tokenizer(told: dict[str, Any], tokenize: Tokenize | None = None) -> LLTokenizer:
    """`pieces` are the tokens' bytes, as Latin-1; `special` the ids that no text spells; `ends` those that end an
    answer, one at least."""
    return LLTokenizer(TokenizerWrapper(_Tokens(told, tokenize)), eos_token=told["ends"])


def trial(tokenizer: LLTokenizer, grammar: str, limits: LLParserLimits) -> str:
    """What is wrong with a grammar, or nothing."""
    begun = time.thread_time()
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        return matcher.get_error().splitlines()[0][:200] or "refused"
    if time.thread_time() - begun > COMPILE_S:
        return "it takes too long to compile"
    for seed in range(WALKS):
        if wrong := _walk(matcher.deep_copy(), random.Random(seed)):  # noqa: S311 - which states to look at, no secret
            return wrong
    return ""


def _walk(matcher: LLMatcher, choice: random.Random) -> str:
    for _ in range(STEPS):
        begun = time.thread_time()
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if time.thread_time() - begun > MASK_S:
            return "its states take too long to compute"
        if matcher.is_error():
            return "it has too many states"
        if not mask:
            return "nothing fits it"
        if matcher.is_stopped():
            return ""
        start = choice.randrange(mask.bit_length())
        beyond = mask >> start
        matcher.consume_token(start + (beyond & -beyond).bit_length() - 1)
    return ""


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    first = json.loads(sys.stdin.readline())
    tokenizer = read_tokenizer(first)
    limits = LLParserLimits(**first["limits"])
    alarm = getattr(signal, "alarm", lambda _: None)
    for line in sys.stdin:
        alarm(ALARM_S)
        sys.stdout.write(trial(tokenizer, json.loads(line), limits).replace("\n", " ") + "\n")
        sys.stdout.flush()
        alarm(0)


if __name__ == "__main__":
    main()
