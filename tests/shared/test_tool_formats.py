import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.tool_formats import GEMMA, HERMES, LLAMA, MAX_HELD, MISTRAL, ToolReader, format_of

NAMES = ("get_weather", "add")
ONE, TWO = ("get_weather", {"city": 'Zür"ich', "n": [1, {"a": "}"}]}), ("add", {"a": 1})


def body(call, key="arguments") -> str:
    return json.dumps({"name": call[0], key: call[1]}, ensure_ascii=False)


def hermes(call: str) -> str:
    return f"<tool_call>{call}</tool_call>"


ANSWERS = {
    "hermes": (
        HERMES,
        f"Let me see.\n<tool_call>\n{body(ONE)}\n</tool_call>\n<tool_call>{body(TWO)}</tool_call>",
        "Let me see.\n",
    ),
    "smollm2": (HERMES, f"<tool_call>[{body(ONE)}, {body(TWO)}]</tool_call>", ""),
    "llama": (LLAMA, f"<|python_tag|>{body(ONE, 'parameters')}; {body(TWO, 'parameters')}", ""),
    "llama bare": (LLAMA, f" {body(ONE, 'parameters')};{body(TWO, 'parameters')}", ""),
    "mistral": (MISTRAL, f"[TOOL_CALLS] [{body(ONE)}, {body(TWO)}]", ""),
    "mistral named": (
        MISTRAL,
        f"[TOOL_CALLS]{ONE[0]}[ARGS]{json.dumps(ONE[1])}[TOOL_CALLS]add[CALL_ID]abc[ARGS]{json.dumps(TWO[1])}",
        "",
    ),
    "gemma json": (GEMMA, f"```json\n[{body(ONE)}, {body(TWO, 'parameters')}]\n```", ""),
    "gemma call": (GEMMA, f"Sure.\n```tool_call\n{body(ONE)}\n```\n```tool_call\n{body(TWO)}\n```", "Sure.\n"),
    "gemma pythonic": (GEMMA, f"```tool_code\n[get_weather(city='Zür\"ich', n={ONE[1]['n']!r}), add(a=1)]\n```", ""),
    "gemma bare": (GEMMA, f"[get_weather(city='Zür\"ich', n={ONE[1]['n']!r}), add(a=1)]", ""),
    "other order": (
        HERMES,
        hermes(f'{{"arguments": {json.dumps(ONE[1])}, "name": "get_weather"}}')
        + hermes(f'{{"type": "function", "function": {body(TWO)}}}'),
        "",
    ),
    "arguments as text": (
        HERMES,
        hermes(json.dumps({"name": ONE[0], "arguments": json.dumps(ONE[1])}))
        + hermes('{"name": "add", "arguments": {"a": 1}, "id": "x"}'),
        "",
    ),
}
TEXTS = {
    "no call": (HERMES, "A <tool is not a <tool_ call > either. {}"),
    "unknown tool": (HERMES, '<tool_call>{"name": "rm", "arguments": {"path": "/"}}</tool_call>'),
    "no JSON": (HERMES, "<tool_call>get_weather(city)</tool_call>"),
    "half a call": (HERMES, '<tool_call>{"name": "add", "argu'),
    "half a marker": (HERMES, "so <tool_ca"),
    "arguments a list": (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    "bare JSON": (LLAMA, '{"answer": 42}'),
    "bare JSON and more": (LLAMA, '{"answer": 42} and {"name": "add", "parameters": {}}'),
    "a list": (GEMMA, "[1, 2, 3]"),
    "code": (GEMMA, "```json\n{\"a\": 1}\n``` is JSON"),
    "code that runs": (GEMMA, "```tool_code\nadd(a=__import__('os').system('true'))\n```"),
    "positional": (GEMMA, "```tool_code\nadd(1)\n```"),
    "python": (LLAMA, "<|python_tag|>print(1)"),
    "mistral text": (MISTRAL, "[TOOL_CALLS]nothing here"),
}  # fmt: skip


def read(format_, pieces, **options):
    reader = ToolReader(format_, NAMES, "seed", **options)
    parts = [reader.push(piece) for piece in pieces] + [reader.flush()]
    text = "".join(shown for shown, _ in parts)
    calls: dict[int, list] = {}
    for piece in (piece for _, found in parts for piece in found):
        if piece.id is not None:
            calls[piece.index] = [piece.name, ""]
        calls[piece.index][1] += piece.arguments
    return text, [(name, json.loads(arguments)) for name, arguments in calls.values()], parts


def cut(text: str, places) -> list[str]:
    at = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[one:other] for one, other in itertools.pairwise(at)]


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=25, deadline=None)
@given(places=st.lists(st.integers(0, 400), max_size=30))
def test_calls_are_found_however_the_text_comes(name, places):
    """Each family's calls, in any pieces: the names, the arguments, and the text before them without a marker."""
    format_, answer, said = ANSWERS[name]
    text, calls, _ = read(format_, cut(answer, places))
    assert calls == [ONE, TWO]
    assert text.rstrip() == said.rstrip()


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_is_no_call_is_text(name, size):
    """Malformed calls, calls of what was not offered, and mere resemblance come out as they came in."""
    format_, answer = TEXTS[name]
    text, calls, _ = read(format_, [answer[at : at + size] for at in range(0, len(answer), size)])
    assert (text, calls) == (answer, [])


@pytest.mark.parametrize("name", ["hermes", "llama", "mistral", "mistral named", "gemma call"])
def test_the_name_comes_first_then_the_arguments_as_they_are_written(name):
    """Fed by characters, a call is announced before its arguments are complete, and these come in many pieces."""
    format_, answer, _ = ANSWERS[name]
    _, _, parts = read(format_, list(answer))
    pieces = [piece for _, found in parts for piece in found if piece.index == 0]
    assert pieces[0].name == "get_weather"
    assert pieces[0].arguments == ""
    assert len(pieces) > 10
    assert all(piece.id is None for piece in pieces[1:])


def test_ids_follow_from_the_answer():
    """Each call has an id of its own; reading the same answer again gives the same ids, another seed others."""

    def ids(seed):
        reader = ToolReader(HERMES, NAMES, seed)
        return [piece.id for piece in reader.push(ANSWERS["hermes"][1])[1] if piece.id]

    assert ids("a") == ids("a")
    assert len({*ids("a"), *ids("b")}) == 4


def test_one_call_at_most_where_only_one_is_wanted():
    """Without parallel calls the reader says after the first that the answer is complete."""
    reader = ToolReader(HERMES, NAMES, "s", parallel=False)
    reader.push(f"<tool_call>{body(ONE)}")
    assert reader.done
    assert reader.calls == 1


def test_what_is_held_is_bounded():
    """An opening that never becomes a call is given back once it is too long, in time linear in its length."""
    reader = ToolReader(HERMES, NAMES, "s")
    shown = "".join(reader.push('<tool_call>{"x": "' if at == 0 else "y" * 64)[0] for at in range(2 * MAX_HELD // 64))
    assert len(shown) > MAX_HELD


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([HERMES, LLAMA, MISTRAL, GEMMA]),
    st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "```json", "```", body(ONE),
             "add", '{"name": "add", "arguments": ', "{", "}", "[", "]", '"', "\\", ",", ";", " ", "text", "(a=1)"]
        ),
        max_size=12,
    ),
)  # fmt: skip
def test_any_text_is_read_the_same_in_any_pieces(format_, parts):
    """Whatever is generated, by characters or at once: same text, same calls, and nothing raised."""
    answer = "".join(parts)
    whole, single = ToolReader(format_, NAMES, "s"), ToolReader(format_, NAMES, "s")
    said, called = zip(whole.push(answer), whole.flush(), strict=True)
    letters = [single.push(char) for char in answer] + [single.flush()]

    def joined(pieces):
        calls: dict[int, str] = {}
        for piece in pieces:
            calls[piece.index] = calls.get(piece.index, f"{piece.name}:") + piece.arguments
        return calls

    assert joined([*called[0], *called[1]]) == joined([piece for _, found in letters for piece in found])
    assert "".join(said).split() == "".join(shown for shown, _ in letters).split()


def test_a_family_is_known_by_its_template():
    """Markers in the template decide; a template that knows no tools gets the common form, Gemma its own."""
    assert format_of("{{ '[TOOL_CALLS]' }}") is MISTRAL
    assert format_of("<|im_start|> <tool_call>") is HERMES
    assert format_of("<|start_header_id|> <|python_tag|>") is LLAMA
    assert format_of("<start_of_turn>user") is GEMMA
    assert format_of("<|im_start|>") is HERMES
