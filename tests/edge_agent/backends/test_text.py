"""Tokens to deltas: characters whole, stop strings never shown, every token counted once."""

from fakes import text_of
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.backends.sampling import Sampled
from edge_agent.backends.text import TextStream
from shared.schemas import Delta, Sampling
from shared.tool_formats import HERMES, ToolReader

BYTES = [bytes([value]) for value in range(256)]
END = 256


def run(tokens: list[int], *, limit: int = 10_000, **sampling: object) -> list[Delta]:
    """Bytes are the tokens, and one more that ends."""
    stream = TextStream(
        [*BYTES, b"<end>"],
        {END},
        Sampling(**sampling),  # type: ignore[arg-type]
        prompt_tokens=7,
        max_tokens=limit,
    )
    deltas = []
    for token in tokens:
        delta = stream.push(Sampled(token, -1.0 if sampling.get("logprobs") is not None else None))
        if delta is not None:
            deltas.append(delta)
            if delta.finish_reason is not None:
                break
    return deltas


@given(st.text(max_size=40))
def test_characters_are_never_cut(text: str) -> None:
    """Every delta is whole characters, and together they are the text; the end token is counted and not shown."""
    tokens = [*text.encode(), END]

    deltas = run(tokens)

    assert text_of(deltas) == text
    assert sum(delta.tokens for delta in deltas) == len(tokens)
    assert all(delta.text for delta in deltas[:-1])
    usage = deltas[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (7, len(tokens))
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]


def test_half_a_character_at_the_limit_is_said() -> None:
    """The bytes that came are not dropped silently: U+FFFD stands for them."""
    deltas = run([*"a€".encode()[:3]], limit=3)

    assert text_of(deltas) == "a\ufffd"
    assert deltas[-1].finish_reason == "length"


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    """Nor is anything after it, and nothing of it before it is whole."""
    deltas = run([*b"one\n\ntwo", END], stop=("\n\n",))

    assert text_of(deltas) == "one"
    assert deltas[-1].finish_reason == "stop"
    assert [delta.stop for delta in deltas] == [None] * (len(deltas) - 1) + ["\n\n"]
    assert sum(delta.tokens for delta in deltas) == 5


def test_text_held_for_a_stop_string_is_given_at_the_end() -> None:
    """A beginning that did not become the stop string belongs to the answer."""
    assert text_of(run([*b"one\n", END], stop=("\n\n",))) == "one\n"
    assert text_of(run([*b"one\n"], limit=4, stop=("\n\n",))) == "one\n"


def test_ignored_ends_are_text() -> None:
    """With `ignore_eos` only the limit and a stop string end an answer."""
    deltas = run([97, END, 98], limit=3, ignore_eos=True)

    assert text_of(deltas) == "a<end>b"
    assert deltas[-1].finish_reason == "length"


def test_log_probabilities_come_with_their_text() -> None:
    """One entry a token, with its own bytes, also where a character needs several."""
    deltas = run([*"é!".encode()], limit=3, logprobs=0)

    assert [[entry.bytes for entry in delta.logprobs] for delta in deltas] == [[(0xC3,), (0xA9,)], [(0x21,)]]
    assert deltas[1].logprobs[0].token == "!"


def test_calls_of_tools_are_told_from_text() -> None:
    """A call in the text is one in the delta, and the reason says so; the marker is not shown."""
    answer = b'So.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    stream = TextStream(
        [*BYTES, b"<end>"],
        {END},
        Sampling(),
        prompt_tokens=7,
        max_tokens=1000,
        tools=ToolReader(HERMES, ("f",), "seed"),
    )
    deltas = [delta for token in (*answer, END) if (delta := stream.push(Sampled(token))) is not None]
    pieces = [piece for delta in deltas for piece in delta.tool_calls]
    assert text_of(deltas) == "So."
    assert (pieces[0].name, "".join(piece.arguments for piece in pieces)) == ("f", '{"a": 1}')
    assert deltas[-1].finish_reason == "tool_calls"
    assert sum(delta.tokens for delta in deltas) == len(answer) + 1
