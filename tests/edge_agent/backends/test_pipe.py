"""The pipe to the model's process: what goes in comes out, and what is no frame is refused."""

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.backends.pipe import (
    MAX_FRAME,
    Ask,
    Broken,
    Cancel,
    Count,
    Counted,
    Fault,
    Held,
    Load,
    Log,
    Ping,
    Pong,
    Ready,
    Step,
    Stop,
    encode,
    from_model,
    to_model,
)  # fmt: skip
from shared.errors import BadFrame, ContextTooLong, Overloaded
from shared.gguf import ModelInvalid
from shared.schemas import ChatRequest, Delta, Message, Sampling, TokenLogprob, ToolPiece, TopLogprob, Usage

REQUEST = ChatRequest(
    id="r",
    model="edge",
    messages=(Message(role="user", content="héllo"),),
    sampling=Sampling(logit_bias={3: -1.5}, stop=("x",), stop_token_ids=(1, 2)),
)
DELTA = Delta(
    text="é",
    tokens=2,
    logprobs=(TokenLogprob("é", -0.5, (195, 169), (TopLogprob("e", -1.0, (101,)),)),),
    tool_calls=(ToolPiece(0, "{}", "id", "name"),),
    finish_reason="stop",
    usage=Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=1),
)
TO = [Load("/m.gguf", "m", 8, None, 2), Ask(1, REQUEST), Count(2, REQUEST), Cancel(1), Ping(), Stop()]
FROM = [
    Ready(2048), Broken(Fault("model_invalid", "m")), Log("warning", "t"), Held(1, True), Counted(2, 7), Pong(0.5),
    Step(((1, DELTA),), ((2, Fault("overloaded", "m", "p", "edge", 1.0)),), 3.5, None),
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.booleans())
def test_frames_survive_any_cut(size: int, to: bool) -> None:
    """Whatever pieces the bytes arrive in."""
    sent, frames = (TO, to_model()) if to else (FROM, from_model())
    data = b"".join(encode(frame) for frame in sent)

    got = [frame for at in range(0, len(data), size) for frame in frames.feed(data[at : at + size])]

    assert got == sent


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.booleans())
@example(noise=b"\x91\xa2\x00\x80", to=False)  # text that is not UTF-8
def test_noise_is_refused(noise: bytes, to: bool) -> None:
    """A body that is no frame is BadFrame, never another error and never a frame of the other direction."""
    frames = to_model() if to else from_model()
    other = encode((FROM if to else TO)[len(noise) % 6])

    for data in (struct.pack("<I", len(noise)) + noise, other):
        with pytest.raises(BadFrame):
            list(frames.feed(data) or [])
            raise BadFrame("nothing can be made of too little")


def test_a_length_beyond_the_limit_is_refused_before_it_is_waited_for() -> None:
    """No memory is set aside for what a broken peer promises."""
    with pytest.raises(BadFrame, match="at most"):
        list(from_model().feed(struct.pack("<I", MAX_FRAME + 1)))


def test_half_a_character_is_refused() -> None:
    """msgpack holds UTF-8, which has none."""
    with pytest.raises(BadFrame, match="half a character"):
        encode(Log("warning", "\ud800"))


@pytest.mark.parametrize(
    "error",
    [
        ContextTooLong("too long", param="messages", source="edge"),
        Overloaded("full", source="edge", retry_after=2.0),
        ModelInvalid("no model", param="model"),
    ],
)
def test_an_error_arrives_as_it_was(error: Exception) -> None:
    """Class, words, field and when to come back."""
    arrived = Fault.of(error).error()  # type: ignore[arg-type]

    assert type(arrived) is type(error)
    assert (str(arrived), arrived.param, arrived.retry_after) == (str(error), error.param, error.retry_after)  # type: ignore[attr-defined]
