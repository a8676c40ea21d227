import time

import grammar_bombs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import BadRequest
from shared.frames import decode_request, encode_request
from shared.grammars import MAX_GRAMMAR_BYTES, check_lark, check_regex, check_schema
from shared.schemas import ChatRequest, Grammar


@pytest.mark.parametrize("name", grammar_bombs.SCHEMAS)
def test_schema_bombs_are_refused_at_once(name):
    """S-41: every schema of the table is a BadRequest, in time that does not grow with what it describes."""
    text = msgspec.json.encode(grammar_bombs.SCHEMAS[name]).decode()
    begun = time.thread_time()
    with pytest.raises(BadRequest):
        check_schema(text)
    assert time.thread_time() - begun < 1


@pytest.mark.parametrize("name", grammar_bombs.REGEXES)
def test_regex_bombs_are_refused_at_once(name):
    """S-41: nested loops, huge counts and broken groups are a BadRequest."""
    with pytest.raises(BadRequest):
        check_regex(grammar_bombs.REGEXES[name])


@pytest.mark.parametrize("name", grammar_bombs.LARKS)
def test_lark_bombs_are_refused_at_once(name):
    """S-41: directives that reach other syntaxes, and huge counts, are a BadRequest."""
    with pytest.raises(BadRequest):
        check_lark(grammar_bombs.LARKS[name])


@pytest.mark.parametrize(
    "text",
    [
        r"[a-z]+",
        r"(\w+\s)+",
        r"\d{4}-\d{2}-\d{2}",
        r"(ab|cd)*e?",
        r"([a-z]+,)*[a-z]+",
        r"a+?b",
        r"[])(+*]+",
        r"\(+\)+",
        r"(?:x[0-9]{1,3}\.){3}",
        r"^(yes|no)$",
        r"[^]a]*",
    ],
)
def test_ordinary_expressions_pass(text):
    """What people write is not mistaken for a bomb: loops with something between their rounds, escapes, classes."""
    check_regex(text)


def test_ordinary_schemas_pass():
    """Definitions used twice, recursion in name only, sixteen levels, booleans, references into lists."""
    level: dict = {"type": "string"}
    for _ in range(15):
        level = {"type": "object", "properties": {"a": level}}
    for schema in (
        level,
        {"$defs": {"p": {"type": "number"}}, "properties": {"x": {"$ref": "#/$defs/p"}, "y": {"$ref": "#/$defs/p"}}},
        {"properties": {"$ref": {"type": "string"}, "type": {"enum": ["a"]}}, "required": ["type"]},
        {"additionalProperties": False, "items": True},
        {"anyOf": [{"type": "null"}, {"$ref": "#/anyOf/0"}]},
        {"$defs": {"a/b": {}}, "$ref": "#/$defs/a~1b"},
        {"type": ["string", "null"], "maxLength": 1000, "pattern": "^a*$"},
        {"minimum": -1.5, "multipleOf": 0.5},
        True,
    ):
        check_schema(msgspec.json.encode(schema).decode())


def test_size_is_counted_in_bytes():
    """The limit is on what is sent, whatever the alphabet."""
    check_regex("a" * 8_000)
    with pytest.raises(BadRequest):
        check_regex("é" * (MAX_GRAMMAR_BYTES // 2 + 1))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="a(|)[]*+?{}1,\\^.-", max_size=40))
def test_any_text_is_checked_or_refused(text):
    """Whatever the characters, a check ends with nothing or with BadRequest."""
    for check in (check_regex, check_lark, check_schema):
        try:
            check(text)
        except BadRequest:
            continue


def test_a_bad_grammar_does_not_come_over_the_wire():
    """S-41: the check is part of the value, so a peer that skips it is refused too, by the field's name."""
    good = ChatRequest(id="r", model="m", prompt="p", grammar=Grammar(syntax="regex", text="a+"))
    body = encode_request(good)
    assert decode_request(body) == good
    with pytest.raises(BadRequest):
        decode_request(body.replace(b"\xa2a+", b"\xa2(a"))
