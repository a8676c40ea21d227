"""Tries grammars out, in a process of its own that may be killed: `python grammar_trial.py`, started by `grammar.py`.

Reads JSON lines. The first has `tokenizer` (tokenizer.json as text), `ends` (token ids) and `limits`; each later one is
a grammar as llguidance reads it. Each is answered by one line: empty if the grammar compiles and gives masks quickly at
some of its states, else what is wrong. Imports nothing of ours, so that it starts quickly and holds no model.
"""

import contextlib
import json
import random
import sys
import time

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MEMORY_BYTES = 4 << 30
COMPILE_S = 1.0
MASK_S = 0.1
"""Processor time for one state's mask: everybody's next token waits for it."""
WALKS, STEPS = 2, 24


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
    tokenizer = LLTokenizer(first["tokenizer"], eos_token=first["ends"])
    limits = LLParserLimits(**first["limits"])
    for line in sys.stdin:
        sys.stdout.write(trial(tokenizer, json.loads(line), limits).replace("\n", " ") + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
