import json
from typing import Any

import msgspec
import pytest
from bad_input import BODIES, CHAT, chat, completion
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import BadRequest
from shared.openai import COMPLETION_MAX_TOKENS, MAX_N, Call, UnsupportedParameter, parse_chat, parse_completion
from shared.schemas import Message, Sampling

PURE = [
    case
    for case in BODIES
    if not case.headers and case.code in ("bad_request", "unsupported_parameter") and case.param != "x-request-id"
]


def parse(path: str, body: bytes) -> Call:
    return (parse_chat if path == CHAT else parse_completion)(body, request_id="r")


@pytest.mark.parametrize("case", PURE, ids=lambda case: f"{case.path[4:8]} {case.name}")
def test_bad_bodies_are_refused_by_name(case: Any) -> None:
    """Every body of the table raises BadRequest, or its subclass for what is not implemented, naming the field."""
    with pytest.raises(BadRequest) as refused:
        parse(case.path, case.body)
    assert (refused.value.code, refused.value.param) == (case.code, case.param)


def test_every_field_reaches_the_request() -> None:
    """What OpenAI calls it and what we call it, for all that is implemented."""
    call = parse_chat(
        chat(
            messages=[
                {"role": "developer", "content": "Be brief.", "name": "boss"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c", "tool_calls": [], "refusal": None},
            ],
            stream=True,
            stream_options={"include_usage": True},
            temperature=0,
            top_p=0.5,
            top_k=40,
            min_p=0.05,
            presence_penalty=-1,
            frequency_penalty=2,
            repetition_penalty=1.1,
            seed=-7,
            max_completion_tokens=9,
            stop="END",
            logprobs=True,
            top_logprobs=3,
            ignore_eos=True,
            service_tier="flex",
            causeway={"label": "edge_only", "deadline_s": 2},
        ),
        request_id="r",
    )
    (request,) = call.requests

    assert (call.kind, call.stream, call.include_usage, call.model) == ("chat", True, True, "auto")
    assert request.messages == (
        Message(role="system", content="Be brief.", name="boss"),
        Message(role="user", content="ab"),
        Message(role="assistant", content="c"),
    )
    assert request.label == "edge_only"
    assert (request.priority, request.deadline_s, call.deadline_s) == ("batch", 2.0, 2.0)
    assert request.sampling == Sampling(
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.05,
        presence_penalty=-1,
        frequency_penalty=2,
        repetition_penalty=1.1,
        seed=-7,
        max_tokens=9,
        stop=("END",),
        logprobs=3,
        ignore_eos=True,
    )


def test_fields_that_cannot_change_the_answer_are_accepted() -> None:
    """OpenAI's bookkeeping fields, its defaults of what we do not implement, and null everywhere."""
    plain = parse_chat(chat(), request_id="r")
    noisy = parse_chat(
        chat(
            user="u",
            metadata={"a": "b"},
            store=True,
            service_tier="priority",
            safety_identifier="s",
            prompt_cache_key="k",
            prompt_cache_retention="24h",
            parallel_tool_calls=False,
            logit_bias={},
            tools=[],
            tool_choice="none",
            functions=[],
            response_format={"type": "text"},
            modalities=["text"],
            audio=None,
            prediction=None,
            verbosity="medium",
            stop=None,
            seed=None,
            n=None,
            max_tokens=None,
            stream=None,
            temperature=None,
            logprobs=None,
        ),
        request_id="r",
    )
    assert noisy == plain
    assert parse_completion(completion(service_tier="flex"), request_id="r").requests[0].priority == "batch"
    text = parse_completion(completion(echo=False, best_of=1, suffix=None, logit_bias=None, user="u"), request_id="r")
    assert text == parse_completion(completion(prompt=["Hello"]), request_id="r")


def test_completions_take_openais_default_length() -> None:
    """`completions` without max_tokens answers 16 tokens, chat has no limit of its own."""
    assert parse_completion(completion(), request_id="r").requests[0].sampling.max_tokens == COMPLETION_MAX_TOKENS
    assert parse_chat(chat(), request_id="r").requests[0].sampling.max_tokens is None
    assert parse_completion(completion(logprobs=4), request_id="r").requests[0].sampling.logprobs == 4


def test_n_choices_are_n_requests() -> None:
    """Each choice has an id and a seed of its own; a seed at the end of the range wraps around."""
    last = (1 << 63) - 1
    call = parse_chat(chat(n=MAX_N, seed=last), request_id="r")

    assert [request.id for request in call.requests] == [f"r-{at}" for at in range(MAX_N)]
    assert [request.sampling.seed for request in call.requests[:3]] == [last, -last - 1, -last]
    assert {request.sampling.seed for request in parse_chat(chat(n=2), request_id="r").requests} == {None}


def test_the_stricter_label_holds() -> None:
    """Neither header nor body can take back what the other one asks."""
    free, secret = {"label": "free"}, {"label": "edge_only"}
    for body, header, expected in (
        (free, None, "free"),
        (free, "edge_only", "edge_only"),
        (secret, "free", "edge_only"),
        (secret, None, "edge_only"),
    ):
        assert parse_chat(chat(causeway=body), request_id="r", label=header).requests[0].label == expected


def test_an_error_names_the_field_but_not_its_value() -> None:
    """A prompt in the wrong place does not come back in the message; a field's own name is shown short and clean."""
    secret = "my secret diary"
    for body in (
        chat(messages=[{"role": secret, "content": "a"}]),
        chat(messages=[{"role": "user", "content": {"text": secret}}]),
        chat(messages=[{"role": "user", "content": [{"type": secret}]}]),
        chat(stop={"a": secret}),
        chat(model=[secret]),
        chat(causeway={"label": secret}),
        completion(prompt={"a": secret}),
    ):
        path = CHAT if b"messages" in body else "/v1/completions"
        with pytest.raises(BadRequest) as refused:
            parse(path, body)
        assert secret not in str(refused.value)
    with pytest.raises(BadRequest) as refused:
        parse_chat(chat(**{"x\r\n\x1b[31m" * 50: 1}), request_id="r")
    assert len(refused.value.param or "") <= 64
    assert str(refused.value).isprintable()


def test_what_is_missing_is_said_so() -> None:
    """By the field's own path, also within a message."""
    for body, param in ((b'{"model": "auto"}', "messages"), (chat(messages=[{"content": "a"}]), "messages[0].role")):
        with pytest.raises(BadRequest) as refused:
            parse_chat(body, request_id="r")
        assert (refused.value.param, refused.value.message) == (param, f"{param} is missing")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["user", "text", "edge_only", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "label", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "model", "messages", "prompt", "n", "seed", "stop", "temperature", "max_tokens", "logprobs", "top_logprobs",
        "stream", "stream_options", "causeway", "tools", "user", "metadata", "echo", "best_of", "top_k", "zap",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, VALUES, max_size=4), st.sampled_from(["chat", "completion"]))
def test_any_json_is_a_valid_request_or_a_typed_error(fields: dict[str, Any], kind: str) -> None:
    """Whatever the fields hold, parsing gives requests that survive a round trip, or BadRequest: nothing else."""
    try:
        call = (
            parse_chat(chat(**fields), request_id="r")
            if kind == "chat"
            else parse_completion(completion(**fields), request_id="r")
        )
    except BadRequest:
        return
    for request in call.requests:
        assert msgspec.json.decode(msgspec.json.encode(request), type=type(request)) == request


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_typed_error(body: bytes) -> None:
    """Random bytes never get further than BadRequest."""
    with pytest.raises(BadRequest):
        parse_chat(body, request_id="r")


def test_duplicate_keys_mean_the_last_one() -> None:
    """As in Python's json; both values are checked for being JSON."""
    body = chat()[:-1] + b', "n": 3, "n": 2}'
    assert json.loads(body)["n"] == len(parse_chat(body, request_id="r").requests) == 2


def test_unsupported_is_told_from_unknown() -> None:
    """A client can tell `not here` from `no such thing` by the code."""
    with pytest.raises(UnsupportedParameter):
        parse_chat(chat(functions=[{}]), request_id="r")
    with pytest.raises(BadRequest) as unknown:
        parse_chat(chat(toolz=[{}]), request_id="r")
    assert unknown.value.code == "bad_request"
