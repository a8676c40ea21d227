import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import BadRequest
from shared.schemas import ChatRequest, Message, Sampling

NUMBERS = {
    "temperature": (0, 2),
    "top_p": (1e-9, 1),
    "top_k": (0, 1 << 20),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-9, 10),
    "seed": (-(1 << 63), (1 << 63) - 1),
    "max_tokens": (1, 1 << 20),
    "logprobs": (0, 20),
}
BEYOND = (math.nan, math.inf, -math.inf, 10**400, -(10**400))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_a_closed_range(name: str) -> None:
    """Both ends are valid; a step beyond, NaN, infinities and numbers no float can hold are not."""
    low, high = NUMBERS[name]
    for value in (low, high):
        assert getattr(Sampling(**{name: value}), name) == value
    step = 1 if isinstance(low, int) and abs(low) > 100 else 0.001
    for value in (*BEYOND, high + 1, low - step):
        with pytest.raises(BadRequest) as refused:
            Sampling(**{name: value})
        assert refused.value.param == ("top_logprobs" if name == "logprobs" else name)


@pytest.mark.parametrize("stop", [("",), ("x" * 257,), ("x",) * 17])
def test_stop_strings_are_bounded(stop: tuple[str, ...]) -> None:
    """Empty, too long or too many are refused."""
    with pytest.raises(BadRequest, match="stop"):
        Sampling(stop=stop)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"id": ""}, "id"),
        ({"id": "r" * 129}, "id"),
        ({"id": "r\n"}, "id"),
        ({"id": "é"}, "id"),
        ({"model": ""}, "model"),
        ({"model": "m" * 257}, "model"),
        ({"prompt": None}, "messages"),
        ({"prompt": ""}, "prompt"),
        ({"messages": (Message(role="user", content="a"),)}, "messages"),
        ({"prompt": None, "messages": (Message(role="user", content="a"),) * 4097}, "messages"),
    ],
)
def test_a_request_is_valid_once_it_exists(fields: dict[str, Any], param: str) -> None:
    """Ids are plain, a model is named, and there is exactly one of prompt and messages."""
    with pytest.raises(BadRequest) as refused:
        ChatRequest(**{"id": "r", "model": "m", "prompt": "p", **fields})
    assert refused.value.param == param


def test_values_are_frozen() -> None:
    """Nobody changes a request that others hold."""
    request = ChatRequest(id="r", model="m", prompt="p")
    with pytest.raises(AttributeError):
        request.model = "other"  # type: ignore[misc]


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        ChatRequest,
        id=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20),
        model=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
        prompt=st.none(),
        messages=st.lists(
            st.builds(
                Message,
                role=st.sampled_from(["system", "user", "assistant", "tool"]),
                content=st.text(st.characters(codec="utf-8")),
                name=st.none() | st.text(st.characters(codec="utf-8"), max_size=5),
            ),
            min_size=1,
            max_size=4,
        ).map(tuple),
        sampling=st.builds(Sampling, temperature=st.floats(0, 2), seed=st.none() | st.integers(-(1 << 63), 2**63 - 1)),
        label=st.sampled_from(["free", "edge_only"]),
        priority=st.sampled_from(["interactive", "batch"]),
        deadline_s=st.none() | st.floats(0, 86_400, exclude_min=True),
    )
)
def test_requests_survive_both_encodings(request: ChatRequest) -> None:
    """JSON and msgpack give back the same request."""
    assert msgspec.json.decode(msgspec.json.encode(request), type=ChatRequest) == request
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=ChatRequest) == request


def test_decoding_checks_as_construction_does() -> None:
    """A peer cannot send what could not be built: out of range, unknown field, wrong type."""
    good = {"id": "r", "model": "m", "prompt": "p"}
    for bad in (
        {"sampling": {"temperature": 3}},
        {"sampling": {"zap": 1}},
        {"zap": 1},
        {"label": "x"},
        {"priority": "urgent"},
        {"priority": 1},
        {"deadline_s": 0},
        {"deadline_s": -1.0},
        {"deadline_s": 86_401},
        {"deadline_s": True},
        {"id": 5},
        {"prompt": ""},
    ):
        with pytest.raises((BadRequest, msgspec.ValidationError)):
            msgspec.json.decode(msgspec.json.encode({**good, **bad}), type=ChatRequest)
