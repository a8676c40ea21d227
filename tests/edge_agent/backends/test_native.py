"""llama.cpp itself, on the real model."""

from pathlib import Path

import pytest

from edge_agent.backends.native import Native
from edge_agent.backends.sampling import Sampled
from edge_agent.backends.text import TextStream
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
