"""Placeholders out, originals back, in whatever pieces the answer arrives."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.privacy.detect import Detector
from router.privacy.redact import Redaction, Restorer, conversation_key

DETECTOR = Detector()
TEXT = "Mail anna@example.org and bob@example.com, then anna@example.org again."


def redaction(text: str = TEXT, key: bytes = b"k") -> tuple[str, Redaction]:
    made = Redaction(key, [text])
    return made.apply(text, DETECTOR.find(text)), made


def restored(restorer: Restorer, pieces: list[str]) -> str:
    return "".join([*(restorer.push(piece) for piece in pieces), restorer.flush()])


def test_equal_values_have_equal_placeholders_and_no_value_is_left() -> None:
    text, made = redaction()
    assert "@" not in text
    first, second, again = re.findall(r"<EMAIL_[0-9a-f]{4}>", text)
    assert first == again != second
    assert set(made.values.values()) == {"anna@example.org", "bob@example.com"}


def test_another_conversation_has_other_placeholders() -> None:
    """P-2: nobody can tell from placeholders that two conversations speak of the same person."""
    assert set(redaction(key=b"one")[1].values).isdisjoint(redaction(key=b"two")[1].values)


def test_the_key_is_the_same_in_every_turn_and_another_for_another_opening() -> None:
    assert conversation_key(b"s", ["user", "hello"]) == conversation_key(b"s", ["user", "hello"])
    openings = [["user", "hello"], ["userhello"], ["user", "hell", "o"], ["user", "Hello"]]
    assert len({conversation_key(b"s", opening) for opening in openings}) == len(openings)
    assert conversation_key(b"s", ["user", "hello"]) != conversation_key(b"t", ["user", "hello"])


@pytest.mark.parametrize("cut", range(64))
def test_split_at_every_place(cut: int) -> None:
    """P-1: one cut anywhere, inside a placeholder or beside it, changes nothing."""
    text, made = redaction("ä anna@example.org 日本 <b> bob@example.com <")
    assert restored(made.restorer(), [text[:cut], text[cut:]]) == "ä anna@example.org 日本 <b> bob@example.com <"


def test_random_texts_in_random_pieces() -> None:
    """The same as replacing in the whole text, for text that is full of what looks like placeholders, and originals
    that look like them too. `tests/benchmarks` does it 60,000 times."""
    noise = random.Random(0)
    assert sum(mismatch(noise) for _ in range(3000)) == 0


def mismatch(noise: random.Random) -> bool:
    values = {
        f"<EMAIL_{noise.randrange(1 << 16):04x}>": noise.choice(['a"b\\c', "<EMAIL_", "x@y.zz"]) for _ in range(3)
    }
    parts = ["<", "E", "<EMAIL_", "日", "_", ">", "0", "\n", *values, *(name.lower() for name in values)]
    text = "".join(noise.choice(parts) for _ in range(noise.randrange(14)))
    lowered = {name.lower(): value for name, value in values.items()}
    expected = re.sub("|".join(values), lambda match: lowered[match[0].lower()], text, flags=re.IGNORECASE)
    pieces = []
    while text:
        size = noise.randrange(5)
        pieces.append(text[:size])
        text = text[size:]
    return restored(Restorer(values), pieces) != expected


def test_only_the_start_of_an_issued_placeholder_is_held_back() -> None:
    """Text flows on at once: a `<` of HTML or of a comparison is not waited on."""
    _, made = redaction()
    restorer = made.restorer()
    assert restorer.push("if a < b") == "if a < b"
    assert restorer.push(" and <div") == " and <div"
    assert restorer.push(" <EMA") == " "
    assert restorer.push("X") == "<EMAX"
    assert max(len(name) for name in made.values) <= 16


def test_an_invented_placeholder_stays() -> None:
    """P-3: what was not issued is the model's own text."""
    _, made = redaction()
    assert restored(made.restorer(), ["ask <EMAIL_ffff", "f> or <PHONE_0000>"]) == "ask <EMAIL_fffff> or <PHONE_0000>"


def test_originals_are_not_looked_through_again() -> None:
    restorer = Restorer({"<A_0000>": "<B_1111>", "<B_1111>": "secret"})
    assert restored(restorer, ["<A_00", "00>"]) == "<B_1111>"


def test_in_json_originals_are_escaped() -> None:
    """Inside a tool call's arguments a quote or a line's end must not end the string."""
    made = Redaction(b"k", [])
    placeholder = made._placeholder("password", 'a"b\\c\nd')
    arguments = restored(made.restorer(in_json=True), ['{"key": "', *placeholder, '"}'])
    assert json.loads(arguments) == {"key": 'a"b\\c\nd'}


CARD, OTHER_CARD = 4111111111111111, "5500005555555559"
VALUES = st.recursive(
    st.sampled_from([CARD, -CARD, 7.5, None, "x", f"pay {OTHER_CARD}", 'anna@example.org said "hi"\n']),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "anna@example.org", OTHER_CARD]), inner, max_size=3)
    ),
    max_leaves=8,
)


def there_and_back(document: object, indent: int | None, cuts: random.Random) -> tuple[str, str]:
    """Hidden, and then the same from a model that repeats it."""
    text = json.dumps(document, indent=indent)
    made = Redaction(b"k", [text])
    hidden = made.apply(text, DETECTOR.find(text), as_json=True)
    pieces, at = [], 0
    while at < len(hidden):
        size = cuts.randint(1, 9)
        pieces.append(hidden[at : at + size])
        at += size
    return hidden, restored(made.restorer(in_json=True), pieces)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), VALUES, min_size=1), st.sampled_from([None, 0, 2]), st.randoms())
def test_json_stays_json_and_numbers_come_back_as_numbers(
    document: dict[str, object], indent: int | None, cuts: random.Random
) -> None:
    """P-5: whatever its shape, JSON is JSON while it is hidden, holds nothing that was found, and comes back as it was:
    numbers as numbers, sign and all, and strings as strings, in any pieces."""
    hidden, back = there_and_back(document, indent, cuts)
    json.loads(hidden)
    assert not any(value in hidden for value in (str(CARD), OTHER_CARD, "anna@"))
    assert json.loads(back) == document


def test_a_number_that_is_also_a_string_comes_back_as_a_string() -> None:
    """The model wrote a string, and nobody can tell which of the two it meant."""
    _, back = there_and_back({"a": CARD, "b": f"{CARD}"}, None, random.Random(1))
    assert json.loads(back) == {"a": str(CARD), "b": str(CARD)}


@pytest.mark.parametrize("spaces", ["", " ", "\n   ", " " * 100])
def test_a_number_is_a_whole_value_and_never_a_key(spaces: str) -> None:
    """A key stays a string, and so does what no comma or bracket follows for a long time, or at all."""
    made = Redaction(b"k", [])
    hidden = made.apply(f"{CARD}", DETECTOR.find(f"{CARD}"), as_json=True)
    answer = f"{{{hidden}{spaces}: {hidden}{spaces}, {hidden} : [{hidden}{spaces}]}}"
    back = restored(made.restorer(in_json=True), list(answer))
    value = CARD if len(spaces) < 65 else str(CARD)
    assert json.loads(back, object_pairs_hook=list) == [(str(CARD), value), (str(CARD), [value])]
    assert restored(made.restorer(in_json=True), list(hidden)) == f'"{CARD}"'


def test_a_users_own_text_of_the_same_shape_is_never_a_placeholder() -> None:
    """A text that already holds what would be issued gets a longer one, and its own comes back unchanged."""
    would_be = next(iter(redaction("mail anna@example.org")[1].values))
    text, made = redaction(f"mail anna@example.org, and {would_be} is a word")
    assert would_be in text
    assert would_be not in made.values
    assert restored(made.restorer(), [text]) == f"mail anna@example.org, and {would_be} is a word"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["anna@example.org", "+49 30 901820", "x", "<", " ", "\n", "é"]), max_size=12))
def test_there_and_back(parts: list[str]) -> None:
    """Whatever the text, out and back is the same text."""
    text = " ".join(parts)
    hidden, made = redaction(text)
    assert restored(made.restorer(), list(hidden)) == text
    assert "anna@" not in hidden
