import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.cache.base import Scope
from edge_agent.cache.key import NEUTRAL, key_of
from shared.schemas import ChatRequest, Grammar, Message, Sampling, Tool, ToolCall

BASE: dict[type[msgspec.Struct], msgspec.Struct] = {
    ToolCall: ToolCall(id="c1", name="look", arguments="{}"),
    Message: Message(role="assistant", content="a"),
    Sampling: Sampling(),
    Grammar: Grammar(syntax="regex", text="a+"),
    Tool: Tool(name="look"),
}
OTHER: dict[type[msgspec.Struct], dict[str, Any]] = {
    ToolCall: {"id": "c2", "name": "see", "arguments": '{"a":1}'},
    Message: {
        "role": "user",
        "content": "b",
        "name": "Ann",
        "tool_calls": (BASE[ToolCall],),
        "tool_call_id": "c1",
    },
    Sampling: {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.5,
        "seed": 1,
        "max_tokens": 7,
        "stop": ("x",),
        "logprobs": 0,
        "ignore_eos": True,
        "min_tokens": 1,
        "stop_token_ids": (3,),
        "logit_bias": {3: 1.0},
    },
    Grammar: {"syntax": "lark", "text": "a*"},
    Tool: {"name": "see", "description": "d", "parameters": '{"type":"object","properties":{}}', "strict": True},
}
ASKED = ChatRequest(id="r1", model="auto", messages=(Message(role="user", content="a"),))
PROMPTED = ChatRequest(id="r1", model="auto", prompt="a")
OTHER_REQUEST: dict[str, Any] = {
    "id": "r2",
    "model": "edge",
    "messages": (Message(role="user", content="b"),),
    "prompt": "b",
    "sampling": Sampling(temperature=0.5),
    "grammar": BASE[Grammar],
    "tools": (BASE[Tool],),
    "tool_choice": "none",
    "allowed_tools": ("look",),
    "parallel_tool_calls": False,
    "label": "redact",
    "priority": "batch",
    "deadline_s": 5.0,
    "scenario": "voice",
    "streamed": True,
}
OTHER_SCOPE: dict[str, Any] = {
    "tenant": "ann",
    "label": "edge_only",
    "target": "cloud",
    "model": "large",
    "weights": "def",
    "runtime": "context_shift",
    "context_length": 4096,
    "redaction": "p1",
    "choice": 1,
}
SCOPE = Scope(tenant="local", label="free", target="edge", model="small", weights="abc", context_length=2048)


def digest(request: ChatRequest, scope: Scope = SCOPE) -> bytes:
    return key_of(request, scope).digest


def mutated(name: str) -> tuple[ChatRequest, ChatRequest]:
    """Two requests that differ in this field alone."""
    before = PROMPTED if name == "prompt" else ASKED
    if name == "allowed_tools":
        before = msgspec.structs.replace(before, tools=(BASE[Tool],))
    return before, msgspec.structs.replace(before, **{name: OTHER_REQUEST[name]})


@pytest.mark.parametrize("name", ChatRequest.__struct_fields__)
def test_every_field_of_a_request_counts_or_is_named_as_neutral(name: str) -> None:
    """S-49: another value is another key, but for what is classified as neutral. A new field fails until it is here."""
    before, after = mutated(name)

    assert before != after
    assert (digest(before) == digest(after)) == (name in NEUTRAL)


@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part in OTHER for name in part.__struct_fields__], ids=lambda one: str(one)
)
def test_every_field_of_what_a_request_is_made_of_counts(part: type[msgspec.Struct], name: str) -> None:
    """S-49: also inside messages, tools, calls, grammar and sampling."""

    def holding(value: Any) -> ChatRequest:
        match value:
            case ToolCall():
                message = Message(role="assistant", content="", tool_calls=(value,))
                return msgspec.structs.replace(ASKED, messages=(message,))
            case Message():
                return msgspec.structs.replace(ASKED, messages=(value,))
            case Tool():
                return msgspec.structs.replace(ASKED, tools=(value,))
            case _:
                return msgspec.structs.replace(ASKED, **{type(value).__name__.lower(): value})

    before = BASE[part]
    after = msgspec.structs.replace(before, **{name: OTHER[part][name]})

    assert before != after
    assert digest(holding(before)) != digest(holding(after))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Scope)])
def test_every_part_of_the_scope_counts(name: str) -> None:
    """S-49: whose answer, how labelled, from where, by which model, its bytes and its size."""
    assert digest(ASKED) != digest(ASKED, dataclasses.replace(SCOPE, **{name: OTHER_SCOPE[name]}))


def test_a_request_holds_no_type_that_is_not_looked_into() -> None:
    """A struct that becomes part of a request must be mutated here too."""
    inside = msgspec.inspect.type_info(ChatRequest)
    found: set[type] = set()

    def walk(info: Any) -> None:
        if isinstance(info, msgspec.inspect.StructType):
            found.add(info.cls)
            for field in info.fields:
                walk(field.type)
        for part in (*getattr(info, "types", ()), getattr(info, "item_type", None)):
            if part is not None:
                walk(part)

    walk(inside)

    assert found == {ChatRequest, *BASE}


@settings(max_examples=50)
@given(tenants=st.lists(st.text(max_size=8), min_size=2, max_size=2, unique=True), text=st.text(min_size=1, max_size=9))
def test_no_two_tenants_share_a_key(tenants: list[str], text: str) -> None:
    """S-47: the tenant stands in front of the key and in its digest, so the same question is another key."""
    request = msgspec.structs.replace(ASKED, messages=(Message(role="user", content=text),))
    one, other = (key_of(request, dataclasses.replace(SCOPE, tenant=tenant)) for tenant in tenants)

    assert one.tenant != other.tenant
    assert one.digest != other.digest
    assert one.raw.startswith(one.tenant)


def test_what_a_key_was_made_of_cannot_be_tried_out_without_the_secret() -> None:
    """With a secret tenant and digest are others, and the same ones each time."""
    plain, keyed = key_of(ASKED, SCOPE), key_of(ASKED, SCOPE, secret=b"s" * 32)

    assert plain.tenant != keyed.tenant
    assert plain.digest != keyed.digest
    assert keyed == key_of(ASKED, SCOPE, secret=b"s" * 32)


def test_the_order_of_a_map_does_not_count() -> None:
    """The same biases in another order are the same request."""
    one = msgspec.structs.replace(ASKED, sampling=Sampling(logit_bias={1: 1.0, 2: 2.0}))
    other = msgspec.structs.replace(ASKED, sampling=Sampling(logit_bias={2: 2.0, 1: 1.0}))

    assert digest(one) == digest(other)
