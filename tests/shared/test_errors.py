import re

import pytest

import shared.errors as errors
from shared.errors import BY_CODE, BadRequest, CausewayError, Overloaded, UpstreamFailed, from_code

CLASSES = sorted(BY_CODE.values(), key=lambda cls: cls.__name__)


def test_the_drawn_tree_is_the_tree() -> None:
    """Every class is in the docstring with its status and its parent, and nothing else is."""
    drawn: dict[str, tuple[int, str]] = {}
    parent = "CausewayError"
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r" *(│   )?[├└]── (\w+) +(\d{3})", line)
        if found is None:
            continue
        inner, name, status = found.groups()
        drawn[name] = (int(status), parent if inner else "CausewayError")
        parent = parent if inner else name
    actual = {cls.__name__: (cls.status, cls.__bases__[0].__name__) for cls in CLASSES}

    assert drawn == actual


def test_codes_are_unique_and_found_again() -> None:
    """Code and class are one to one, so that an error survives the wire."""
    assert len(BY_CODE) == len({cls.code for cls in CLASSES}) == len(CLASSES)
    assert "internal" in BY_CODE


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_an_error_is_rebuilt_from_its_parts(cls: type[CausewayError]) -> None:
    """What the other end sent becomes the same class with the same parts."""
    error = from_code(cls.code, "no", param="n", source="cloud", retry_after=2.0)
    assert type(error) is cls
    assert (str(error), error.param, error.source, error.retry_after) == ("no", "n", "cloud", 2.0)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_only_what_may_pass_is_retryable(cls: type[CausewayError]) -> None:
    """A bad request stays bad; being busy, unreachable or late may pass."""
    if cls.retryable:
        assert cls.status in (429, 502, 503, 504)
    if issubclass(cls, BadRequest):
        assert 400 <= cls.status < 500
        assert not cls.retryable


def test_an_unknown_code_is_a_failure_of_the_other_side() -> None:
    """A newer peer's code does not break an older one."""
    assert type(from_code("from_the_future", "x")) is UpstreamFailed


def test_the_first_to_say_who_failed_is_right() -> None:
    """`at` does not overwrite."""
    assert Overloaded("x", source="cloud").at("edge").source == "cloud"
    assert Overloaded("x").at("edge").source == "edge"
