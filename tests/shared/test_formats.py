import re

import pytest
from bad_input import chat, completion
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.openai import parse_chat, parse_completion
from shared.schemas import Grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ANY = Grammar(syntax="json_schema", text='{"type":"object"}')


def grammar_of(**fields):
    return parse_chat(chat(**fields), request_id="r").requests[0].grammar


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ANY),
        ({"structured_outputs": {"json_object": True}}, ANY),
        ({"structured_outputs": {"regex": "a|b"}}, Grammar(syntax="regex", text="a|b")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar(syntax="lark", text='start: "a"')),
        ({"structured_outputs": {"json": '{"type":"null"}'}}, Grammar(syntax="json_schema", text='{"type":"null"}')),
        ({"structured_outputs": {"choice": ["yes", "no."]}}, Grammar(syntax="regex", text=r"yes|no\.")),
    ],
)
def test_each_form_is_one_grammar(fields, expected):
    """OpenAI's and vLLM's forms mean the same few things; `text` means none."""
    assert grammar_of(**fields) == expected


def test_a_schema_is_taken_as_it_is():
    """The order of its keys is the order in which a model has to write them."""
    named = {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"}
    grammar = grammar_of(response_format={"type": "json_schema", "json_schema": named})
    assert grammar == grammar_of(structured_outputs={"json": SCHEMA})
    assert grammar == Grammar(syntax="json_schema", text='{"type":"object","properties":{"a":{"type":"integer"}}}')


def test_every_choice_has_the_grammar():
    """n choices, and completions, are held to it too."""
    call = parse_chat(chat(n=3, response_format={"type": "json_object"}), request_id="r")
    assert [request.grammar for request in call.requests] == [ANY] * 3
    text = parse_completion(completion(structured_outputs={"json_object": True}), request_id="r")
    assert text.requests[0].grammar == ANY
    assert text.grammar_field == "structured_outputs"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(min_size=1, max_size=12, alphabet=st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4
    )
)
def test_choices_are_taken_literally(choices):
    """The expression made of them matches each of them and nothing that merely looks alike."""
    pattern = grammar_of(structured_outputs={"choice": choices}).text
    assert all(re.fullmatch(pattern, choice) for choice in choices)
    assert re.fullmatch(pattern, "".join(choices) + "!") is None
