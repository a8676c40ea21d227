from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.document import MAX_BYTES, InvalidPolicy, read, shorten, spell


def fault(source: str | bytes) -> InvalidPolicy:
    with pytest.raises(InvalidPolicy) as caught:
        read(source, name="p.yaml")
    return caught.value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("800", 800),
        ("-3", -3),
        ("010", 10),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("No", "No"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("'800'", "800"),
        ('"true"', "true"),
        ("''", ""),
        ("[1, a]", (1, "a")),
        ("{a: [], b: {}}", {"a": (), "b": {}}),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_the_core_schema(written, value):
    """Only what looks like a number or a truth value to everybody is one."""
    found = read(f"x: {written}", name="p").value["x"]
    assert (found, type(found)) == (value, type(value))


def test_marks_point_at_keys_and_items():
    """Every value has the line and column where a reader would look for it."""
    document = read("mode: x\nrules:\n  - name: a\n    when:\n      turns: 5\n", name="p")
    assert document.marks == {
        (): (1, 1),
        ("mode",): (1, 1),
        ("rules",): (2, 1),
        ("rules", 0): (3, 5),
        ("rules", 0, "name"): (3, 5),
        ("rules", 0, "when"): (4, 5),
        ("rules", 0, "when", "turns"): (5, 7),
    }


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("source", "line", "field", "message"),
    [
        ("", 1, "", "empty"),
        ("# only a comment\n", 1, "", "empty"),
        ("a: 1\n---\nb: 2\n", 2, "", "only one document"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", 4, "b.c", "written twice"),
        ("a: 1\n\na: 1\n", 3, "a", "written twice"),
        (BOMB, 1, "a", "anchors and aliases"),
        ("a: 1\nb: *a\n", 2, "b", "anchors and aliases"),
        ("a:\n  - &x 1\n", 2, "a[0]", "anchors and aliases"),
        ("&k a: 1", 1, "", "anchors and aliases"),
        ("a: !!python/object/apply:os.system ['id']", 1, "a", "tags"),
        ("a:\n  b: !!str 5\n", 2, "a.b", "tags"),
        ("a: ! 5", 1, "a", "tags"),
        ("!!map {a: 1}", 1, "", "tags"),
        ("? [1, 2]\n: x", 1, "", "a key must be text"),
        ("a:\nb: 1", 1, "a", "a value is missing"),
        ("a: 1\nb: ~", 2, "b", "a value is missing"),
        ("a: [1, null]", 1, "a[1]", "a value is missing"),
        ("a: .nan", 1, "a", "not a finite number"),
        ("a: -.inf", 1, "a", "not a finite number"),
        ("a: 1e309", 1, "a", "not a finite number"),
        ("a: " + "9" * 19, 1, "a", "more than 18 digits"),
        ("a: " + "9" * 100_000, 1, "a", "more than 18 digits"),
        ("a: 1\nb: " + "[" * 40 + "]" * 40, 2, "b[0][0][0]", "nested more than 16 deep"),
        ("[" * 200_000, 1, "[0][0][0][0]", "nested more than 16 deep"),
        ("{a: " * 50_000, 1, "a.a.a.a", "nested more than 16 deep"),
        ("a: 1\nb: [" + "1," * 120_000 + "]", 2, "b[19997]", "more than 20000 values"),
        ("a: 1\n b: 2", 2, "", "not YAML"),
        ("a: [1, 2", 1, "", "not YAML"),
        ("a: 'x", 1, "", "not YAML"),
        ("a: 1\n\tb: 2", 2, "", "not YAML"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", 1, "", "not YAML"),
        ('a: "\\UFFFFFFFF"', 1, "", "not YAML"),
        ('a: 1\nb: "\\ud800"', 2, "b", "surrogate"),
        ('"\\udfff": 1', 1, "", "surrogate"),
        ("a: 1\nb: \x00", 2, "", "does not allow"),
        ("a: 1\n\ud800", 2, "", "does not allow"),
        ("a: 1\n# " + "x" * (1 << 20), 1, "", "larger than 256 KiB"),
        (b"a: 1\nb: \xff\xfe", 2, "", "not UTF-8"),
        (b"a: 1\n# " + b"x" * MAX_BYTES, 1, "", "larger than 256 KiB"),
    ],
    ids=lambda case: repr(case)[:30],
)
def test_hostile_text_is_refused_by_name(source, line, field, message):
    """Each thing that is not plain data is refused, with the line and the field where it stands."""
    error = fault(source)
    assert (error.line, error.field) == (line, field)
    assert message in error.message


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="ab01.-:,?#&*!|>'\"%@[]{}~<\\ \n\t\x00\ud800é", max_size=60) | st.binary(max_size=60))
def test_reading_is_total(source):
    """Any text or bytes become a document or an InvalidPolicy, never another error."""
    try:
        marks = read(source, name="p").marks.values()
    except InvalidPolicy as error:
        marks = [(error.line, error.column)]
    assert all(line >= 1 and column >= 1 for line, column in marks)


def test_error_text():
    """`file:line: field: message`: what editors and people can follow."""
    error = fault("a:\n  b: ~\n")
    assert str(error) == "p.yaml:2: a.b: a value is missing"
    assert (error.code, error.status, error.param) == ("invalid_policy", 400, "a.b")


def test_spell_and_shorten():
    """Paths read like code; text from a file cannot break a line or a terminal."""
    assert spell(("rules", 2, "when", ">")) == "rules[2].when.>"
    assert spell(()) == ""
    assert shorten("a\n\x1b[31m") == "a\\n\\x1b[31m"
    assert len(shorten("x" * 1000)) < 70
