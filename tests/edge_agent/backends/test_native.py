"""llama.cpp itself, on the real model."""

import sys
from pathlib import Path

import psutil
import pytest

from edge_agent.backends.native import Native
from edge_agent.backends.sampling import Sampled
from edge_agent.backends.text import TextStream
from edge_agent.facts import facts_of
from shared.schemas import Sampling

pytestmark = pytest.mark.model


def test_characters_of_several_tokens_come_whole(model_path: Path) -> None:
    """The model's own tokens of such a text, one by one through the text side, give it back without a broken one."""
    native = Native(model_path, slots=1, context=64, threads=1)
    text = "naïve 日本語 🚀👩‍🚀 Ωmega"
    try:
        tokens = native.tokenize(text, add_special=False)
    finally:
        native.close()
    stream = TextStream(native.pieces, native.ends, Sampling(ignore_eos=True), prompt_tokens=1, max_tokens=len(tokens))

    deltas = [delta for token in tokens if (delta := stream.push(Sampled(int(token))))]

    assert len(deltas) < len(tokens)
    assert "".join(delta.text for delta in deltas) == text
    assert all("\ufffd" not in delta.text for delta in deltas)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is allocated")
def test_slots_that_nobody_has_used_take_no_memory(model_path: Path) -> None:
    """Of 32 slots of 2,048 tokens, the process has not even a tenth; a sequence that is copied takes its own length."""
    facts, process = facts_of(model_path), psutil.Process()

    def taken() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    before = taken()
    native = Native(model_path, slots=32, context=2048, threads=1)
    try:
        cache = 32 * 2048 * facts.kv_bytes
        assert taken() - before < cache / 10
        native.tokens[:64] = native.tokenize("One two three four " * 20, add_special=False)[:64]
        native.positions[:64], native.wanted[63] = range(64), 1
        assert native.decode(64)
        row = native.logits()[0].copy()
        assert native.restore(5, native.state(0))
        native.keep(5, 63)
        native.tokens[0], native.positions[0], native.sequences[0], native.wanted[0] = native.tokens[63], 63, 5, 1
        assert native.decode(1)
        assert int(native.logits()[0].argmax()) == int(row.argmax())
        assert taken() - before < cache / 10
        assert not native.restore(6, b"")
    finally:
        native.close()
