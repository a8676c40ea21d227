"""router.answer: what an answer comes down to, and how it looks beside its question."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.answer import final_answer, plain, traits

OPTIONS = "How heavy is it?\nA. 3 kg\nB. 12 kg\nC. 40 kg\nD. None of the above\nAnswer:"
PROGRAM = "def f(text):\n    for c in text:\n        pass\n    return len(text)\nassert f('abcd') == ??"


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("42", "42"),
        ("  B ", "B"),
        ("We add three and four and so, working it through with care, we find that \\boxed{7} holds.", "7"),
        (
            'Long reasoning, which goes on for a good while before it ends. {"reasoning": "...", "answer": "1,234"}',
            "1,234",
        ),
        ("After a good deal of thought over the options given above the answer is (C). Indeed.", "C"),
        ("There are 12 eggs a dozen and she has three dozens of them in her basket, which makes 36", "36"),
        ("A long text which states no number and marks nothing at all as what it comes down to.", ""),
    ],
)
def test_the_final_answer_is_found(text: str, final: str) -> None:
    """A short answer is itself; a long one is what it marks as its answer, else its last number, else nothing."""
    assert final_answer(text) == final


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234", "1234.0"),
        ("$5", "5"),
        ("\\dfrac{1}{2}", "\\frac{1}{ 2}"),
        ('["a", "b"]', "['a','b']"),
        ("b", "B."),
        ("'abc'", "abc"),
    ],
)
def test_the_same_answer_in_another_form_is_the_same(one: str, other: str) -> None:
    """Numbers are compared by value; LaTeX, quotes, spaces and case make no difference."""
    assert plain(one) == plain(other) != ""


@pytest.mark.parametrize(("one", "other"), [("12", "21"), ("\\frac{1}{2}", "\\frac{2}{1}"), ("-3", "3"), ("A", "B")])
def test_different_answers_stay_different(one: str, other: str) -> None:
    """Evening out the form never makes two values one."""
    assert plain(one) != plain(other)


@pytest.mark.parametrize("nothing", ["", "  ", "None", "nan"])
def test_no_answer_equals_nothing(nothing: str) -> None:
    """What stands for no answer has no form to be compared in."""
    assert plain(nothing) == ""


def test_the_place_among_the_options_is_told() -> None:
    """Of the four options C is the third and the largest number; D says none of them."""
    third, last = traits(OPTIONS, "C"), traits(OPTIONS, "D")

    assert (third[14], third[15], third[16]) == (2.0, 0.5, 4.0)
    assert third[20] == 0.5  # two of four options are smaller
    assert (third[22], last[22]) == (0.0, 1.0)


def test_the_type_that_a_program_returns_is_expected() -> None:
    """A string where the program returns a length is marked; a number is not."""
    number, string = traits(PROGRAM, "4"), traits(PROGRAM, "'abcd'")

    assert (number[24], string[24]) == (0.0, 1.0)
    assert (number[26], string[26]) == (0.0, 1.0)  # the answer repeats the argument


@given(st.sampled_from(["", OPTIONS, PROGRAM, "What is 3 + 4?"]), st.text(max_size=80), st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_traits_are_finite_and_as_many_for_every_answer(query: str, more: str, final: str) -> None:
    """Any answer to any question yields the same number of finite measures."""
    found = traits(query + more, final)

    assert len(found) == len(traits("", ""))
    assert all(map(math.isfinite, found))


@pytest.mark.parametrize("hostile", ["f(" * 1200, "==" * 1200, "9," * 1200, "\\left" * 400, "\nA. " * 600])
def test_hostile_texts_are_read_in_linear_time(hostile: str) -> None:
    """Repetitions of what the patterns look for cost no more than other text (a hang here would be the failure)."""
    assert len(traits(f"def f(): assert {hostile}", hostile[:400])) == len(traits("", ""))
