import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.features import HINTS, SCAN_CHARS, DeviceReading, RequestFeatures, estimate_tokens, measure
from shared.schemas import ChatRequest, Message, Sampling
from tests.router.texts import joined


def ask(text: str, **fields) -> ChatRequest:
    return ChatRequest(id="r", model="auto", messages=(Message(role="user", content=text),), **fields)


def hints(text: str) -> set[str]:
    features = measure(ask(text), prompt_tokens=1)
    return {hint for hint in ("code", "maths", "json", "tools") if getattr(features, hint)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write a haiku about rain.", set()),
        ("Who was in the class of 2020? Select one from the list.", set()),
        ("Schreibe mir bitte ein Gedicht über den Regen; danke.", set()),
        ("今日はいい天気ですね", set()),
        ("Meet me on 12/05 at 3 pm, it costs $5 or $6.", set()),
        ("```\nx\n```", {"code"}),
        ("what does this do?\n    def f(x):\n        return x", {"code"}),
        ("#include <stdio.h>", {"code"}),
        ("fn main() {", {"code"}),
        ("SELECT name FROM users", {"code"}),
        ("Explain this Traceback please", {"code"}),
        ("was macht\nconst x\nfoo();", {"code"}),
        (r"Was ist \frac{1}{2}?", {"maths"}),
        ("∫ x dx", {"maths"}),
        ("12 * 9", {"maths"}),
        ("Solve for the side", {"maths"}),
        ("How many apples are left?", {"maths"}),
        ("Answer as JSON", {"json"}),
        ('like {"name": "x"}', {"json"}),
        ("use the tool", {"tools"}),
        ("a function call", {"tools"}),
    ],
)
def test_hints(text, expected):
    """Code, maths, JSON and tools are told from the text, whatever the language around them; plain prose is none."""
    assert hints(text) == expected


FRAGMENTS = (
    "def f", "(", "import os", "#include <", "fn x", "SELECT a", " FROM b", "select *", "foo()", ";", "{", "python",
    "c++", "\n", " ", "\t", "3", "+", " - ", "x =", "?", "\\frac", "π", "solve", "how many", "json", '{"a"', ":",
    "use the ", "function", "tool", " call", "s", "_", ".", "`", "```", "const x", "é",
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(joined(FRAGMENTS, most=10))
def test_all_hints_at_once_are_each_by_itself(text):
    """One pass over all patterns says what each of them says when it is tried alone, by another engine."""
    alone = {hint for hint, pattern in HINTS.items() if re.search(pattern, text, re.ASCII)}
    assert hints(text) == alone


def test_tool_messages_are_a_tools_hint():
    """A tool's result in the conversation says more than any word."""
    request = ChatRequest(id="r", model="auto", messages=(Message(role="tool", content="42 degrees"),))
    assert measure(request, prompt_tokens=1).tools


def test_request_fields_are_carried():
    """Model, label, limits and turns come from the request itself."""
    request = ChatRequest(
        id="r",
        model="smollm2:135m",
        label="edge_only",
        sampling=Sampling(max_tokens=9),
        messages=(
            Message(role="system", content="s"),
            Message(role="user", content="a"),
            Message(role="assistant", content="b"),
            Message(role="user", content="c"),
        ),
    )
    features = measure(request, prompt_tokens=30, expected_output_tokens=100)
    assert features == RequestFeatures(
        prompt_tokens=30,
        model="smollm2:135m",
        label="edge_only",
        max_tokens=9,
        expected_output_tokens=9,
        turns=2,
    )


def test_a_raw_prompt_is_one_turn():
    """A completion has no messages, and still somebody asked."""
    assert measure(ChatRequest(id="r", model="auto", prompt="x"), prompt_tokens=1).turns == 1


@pytest.mark.parametrize(
    ("max_tokens", "required", "needed"), [(None, 101, 150), (10, 110, 110), (400, 500, 500)], ids=str
)
def test_context(max_tokens, required, needed):
    """What was asked for is required; what is only expected is merely comfortable."""
    features = RequestFeatures(prompt_tokens=100, max_tokens=max_tokens, expected_output_tokens=50)
    assert (features.required_context, features.needs_context) == (required, needed)


@pytest.mark.parametrize("where", ["```\n" + "x" * 200_000, "x" * 200_000 + "\n```"], ids=["start", "end"])
def test_both_ends_of_a_long_prompt_are_read(where):
    """A question stands before or after what is pasted."""
    assert measure(ask(where), prompt_tokens=1).code


def test_the_scan_is_bounded():
    """The middle of a text longer than SCAN_CHARS is not read, so that no prompt makes a decision slow."""
    far = "x" * SCAN_CHARS
    assert not measure(ask(f"{far}\n```\n{far}"), prompt_tokens=1).code


def test_newest_messages_are_read_first():
    """An old flood of text does not hide what is asked now."""
    messages = (Message(role="user", content="x" * 100_000), Message(role="user", content="solve it"))
    assert measure(ChatRequest(id="r", model="auto", messages=messages), prompt_tokens=1).maths


@pytest.mark.parametrize("newer", [SCAN_CHARS, SCAN_CHARS - 1, SCAN_CHARS - 2])
def test_older_messages_share_the_same_bound(newer):
    """However many messages there are, no more than SCAN_CHARS of them are read."""
    messages = (Message(role="user", content="xx solve it xx"), Message(role="user", content="x" * newer))
    assert not measure(ChatRequest(id="r", model="auto", messages=messages), prompt_tokens=1).maths


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 4), ("abcd", 5), ("abcde", 6), ("日本語", 7), ("naïve", 6), ("x" * 4000, 1004), ("\ud800", 5)],
    ids=repr,
)
def test_estimate_tokens(text, tokens):
    """Four ASCII characters a token, one of any other script, and a template around each message."""
    assert estimate_tokens(ask(text)) == tokens


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=500))
def test_measuring_never_fails(text):
    """Any text has features, and the same text the same ones."""
    request = ask(text)
    assert measure(request, prompt_tokens=3) == measure(request, prompt_tokens=3)
    assert estimate_tokens(request) >= 4


def test_values_are_frozen():
    """A decision's inputs cannot change under it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        DeviceReading(model="m", context_length=1).queue_depth = 2


@pytest.mark.parametrize(("depth", "full"), [(0, False), (3, False), (4, True), (5, True)])
def test_queue_full(depth, full):
    assert DeviceReading(model="m", context_length=1, queue_depth=depth, queue_capacity=4).queue_full is full
