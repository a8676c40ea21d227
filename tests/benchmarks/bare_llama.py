"""A bare llama.cpp decode loop: what the daemon's runtime is measured against.

    python -m tests.benchmarks.bare_llama FILE.gguf SEQUENCES TOKENS

Low-level API, greedy, the daemon's own context settings and threads; no queue, no text, no HTTP. Prints tokens/s.
"""

import sys
from pathlib import Path
from time import perf_counter

import numpy as np

from edge_agent.backends.native import Native

SLOTS = 8
PROMPT = "Tell me a story about a ship and its friends."


def run(path: Path, n_seqs: int, n_tokens: int) -> float:
    """Tokens per second of all sequences in sum, while each decodes `n_tokens` after its prompt."""
    native = Native(path, slots=SLOTS, context=None, threads=None)
    try:
        prompt = native.tokenize(PROMPT, add_special=True)
        sequences = np.arange(n_seqs)
        tokens = np.array([_prefill(native, prompt, sequence) for sequence in sequences])
        native.sequences[:n_seqs] = sequences
        native.wanted[:n_seqs] = 1
        started = perf_counter()
        for position in range(len(prompt), len(prompt) + n_tokens):
            native.tokens[:n_seqs] = tokens
            native.positions[:n_seqs] = position
            _decode(native, n_seqs)
            tokens = native.logits()[:n_seqs].argmax(axis=1)
        return n_seqs * n_tokens / (perf_counter() - started)
    finally:
        native.close()


def _prefill(native: Native, prompt: np.ndarray, sequence: int) -> int:
    size = len(prompt)
    native.tokens[:size] = prompt
    native.positions[:size] = range(size)
    native.sequences[:size] = sequence
    native.wanted[:size] = 0
    native.wanted[size - 1] = 1
    _decode(native, size)
    return int(native.logits()[0].argmax())


def _decode(native: Native, count: int) -> None:
    if not native.decode(count):
        raise RuntimeError("llama_decode failed")


if __name__ == "__main__":
    print(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
