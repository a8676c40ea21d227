from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.stops import StopScanner

TEXT = st.text(alphabet="ab<", max_size=24)
STOPS = st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), max_size=3).map(tuple)


def oracle(pieces: list[str], stops: tuple[str, ...]) -> str:
    """What may be shown, found the slow way: grow the whole text piece by piece and look for the earliest stop."""
    whole = ""
    for piece in pieces:
        whole += piece
        hits = [whole.find(stop) for stop in stops if stop in whole]
        if hits:
            return whole[: min(hits)]
    return whole


def longest_open(text: str, stops: tuple[str, ...]) -> int:
    """How much of the end of `text` could still become a stop string."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )


@settings(max_examples=400, deadline=None)
@given(st.lists(TEXT, max_size=12), STOPS)
@example(["a", "ab", "b"], ("aab",))
@example(["<", "<a"], ("<a", "a<"))
def test_released_text_is_what_the_whole_text_says(pieces: list[str], stops: tuple[str, ...]) -> None:
    """However the text is cut, what comes out is the text before the earliest stop, and all of it at the end."""
    scanner = StopScanner(stops)
    released = "".join(scanner.push(piece) for piece in pieces) + scanner.flush()

    assert released == oracle(pieces, stops)
    assert (scanner.hit is not None) == any(stop in "".join(pieces) for stop in stops)
    assert not any(stop in released for stop in stops)


@settings(max_examples=400, deadline=None)
@given(st.lists(TEXT, max_size=12), STOPS)
def test_no_more_is_held_back_than_must_be(pieces: list[str], stops: tuple[str, ...]) -> None:
    """After every piece exactly the longest suffix that may still become a stop is missing."""
    scanner, seen, released = StopScanner(stops), "", ""
    for piece in pieces:
        seen += piece
        released += scanner.push(piece)
        if scanner.hit is not None:
            return
        assert len(seen) - len(released) == longest_open(seen, stops)


def test_after_a_hit_everything_is_swallowed() -> None:
    """Nothing follows the cut, and the stop that hit is known."""
    scanner = StopScanner(("END", "EN"))
    assert scanner.push("ab E") == "ab "
    assert scanner.push("N more") == ""
    assert scanner.hit == "EN"
    assert scanner.push("again") + scanner.flush() == ""


def test_without_stops_text_passes_at_once() -> None:
    """No stop strings, no delay."""
    assert StopScanner(()).push("any") == "any"
