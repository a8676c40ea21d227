"""What is found in a text, what is not, and that no text can be expensive or pass unread."""

import contextlib
import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.privacy.detect import MAX_CHARS, MAX_WORDS, Detector, Finding, Undecided
from router.privacy.forms import Form
from tests.router.privacy import labelled
from tests.router.texts import joined

DETECTOR = Detector()


def full_width(text: str) -> str:
    return "".join(chr(ord(char) + 0xFEE0) if char > " " else char for char in text)


def kinds_in(text: str) -> list[str]:
    return [finding.kind for finding in DETECTOR.find(text)]


def test_the_labelled_set_is_large_and_has_texts_with_nothing_to_find() -> None:
    """A score on a small or one-sided set would say little."""
    texts = list(labelled.texts())
    assert len(texts) >= 600
    assert sum(not text.private for text in texts) >= 150
    assert len({mark.kind for text in texts for mark in text.private}) >= 30


def test_labelled_texts() -> None:
    """Of each kind almost all are found, and almost nothing else."""
    scores = labelled.score(DETECTOR)
    assert {kind: round(score.recall, 2) for kind, score in scores.items() if score.recall < 0.95} == {}
    assert {kind: round(score.precision, 2) for kind, score in scores.items() if score.precision < 0.95} == {}


def test_a_detector_without_a_kind_misses_it() -> None:
    """The labelled score can fail."""
    scores = labelled.score(Detector(only=["phone"]))
    assert scores["email"].recall == 0
    assert scores["phone"].recall > 0.9


@pytest.mark.parametrize(
    "written",
    [
        "bob@example.com",
        "bob%40example.com",
        "bob\\u0040example.com",
        "bob&#64;example.com",
        "b\u200bob@exam\u00adple.com",
        full_width("bob@example.com"),
        "Ym9iQGV4YW1wbGUuY29t",
    ],
)
def test_decoded_forms(written: str) -> None:
    """However it is written, it is found, and the place is that of what was written."""
    text = f"mail to {written} now"
    (found,) = DETECTOR.find(text)
    assert (found.kind, text[found.start : found.end]) == ("email", written)


def test_the_secret_wins_where_two_overlap() -> None:
    """A URL with a password is one secret, not an e-mail address with a remainder that leaks the password."""
    text = "postgres://app:pa55w0rd@db.example.com/x"
    (found,) = DETECTOR.find(text)
    assert (found.kind, found.secret, found.start) == ("url_credentials", True, 0)
    assert "pa55w0rd" in text[found.start : found.end]


def test_own_words() -> None:
    """The administrator's words are found whole, in any case, in any script."""
    detector = Detector(only=[], words=["Project Heron", "naïve", "東京工場"])
    text = "PROJECT HERON, herons and the 東京工場で"
    assert [text[one.start : one.end] for one in detector.find(text)] == ["PROJECT HERON", "東京工場"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"only": ["email", "shoe_size"]}, "shoe_size"),
        ({"words": ["x"]}, "2 to"),
        ({"words": ["y" * 200]}, "2 to"),
        ({"words": ["word"] * (MAX_WORDS + 1)}, str(MAX_WORDS)),
    ],
)
def test_bad_options(options: dict[str, Sequence[str]], named: str) -> None:
    """A kind that does not exist and words that cannot be matched are named."""
    with pytest.raises(ValueError, match=named):
        Detector(**options)  # type: ignore[arg-type]


def test_hostile_dictionary() -> None:
    """Thousands of words that look like patterns are words all the same, and none makes the search slow or wrong."""
    words = [f"(a+)+{number}[" for number in range(3000)]
    detector = Detector(only=[], words=words)
    text = "a" * 20_000 + " (a+)+2999[ "
    assert [text[one.start : one.end] for one in detector.find(text)] == ["(a+)+2999["]


HOSTILE = {
    "dots": "." * 30_000,
    "at signs": "a@" * 15_000,
    "digits": "1" * 30_000,
    "dashes": "-----BEGIN PRIVATE KEY-----" * 1000,
    "tokens": "eyJ" * 10_000,
    "addresses": "bob@example.com " * 1800,
    "phones": "tel 030 1234567 " * 1800,
    "cards": "4111 1111 1111 1111 " * 1500,
    "percent": "%41%42" * 5000,
    "base64": "QUJDREVGR0hJSktMTU5P " * 1400,
    "accents": "a\u0301" * 15_000,
    "full width": full_width("1234 ") * 6000,
    "colons": "a1:" * 10_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_end(name: str) -> None:
    """Made to be slow, a text takes a moment at most. (The limit is far above what it takes and far below what a
    quadratic search would.)"""
    start = time.process_time()
    with contextlib.suppress(Undecided):
        DETECTOR.find(HOSTILE[name])
    assert time.process_time() - start < 1.0


def test_too_long_is_undecided() -> None:
    """What is not looked through is not called clean."""
    with pytest.raises(Undecided, match="characters"):
        DETECTOR.find("a" * (MAX_CHARS + 1))


def test_too_many_encoded_passages_are_undecided() -> None:
    with pytest.raises(Undecided, match="encoded"):
        DETECTOR.find(HOSTILE["base64"])


def test_over_the_number_of_checks_candidates_count_as_found() -> None:
    """Near misses in front cannot use up the checks and let a real number pass behind them."""
    near = "tel. 000-000-00 " * 500
    assert "phone" in kinds_in(near + "+49 30 901820")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60), st.text(max_size=60))
def test_found_among_anything(before: str, after: str) -> None:
    """Whatever stands around it, an address between spaces is found at its place, and findings are in order and
    apart."""
    text = f"{before} anna.silva@example.org {after}"
    found = DETECTOR.find(text)
    place = text.index("anna.silva@example.org", len(before))
    assert any(one.start <= place and one.end >= place + len("anna.silva@example.org") for one in found)
    assert all(one.end <= other.start for one, other in itertools.pairwise(found))
    assert all(0 <= one.start < one.end <= len(text) for one in found)
    assert all(isinstance(one, Finding) for one in found)


class Suspicious(Detector):
    """Looks for everything, in another order, and through every form, whatever the first look says."""

    def _look(self, form: Form) -> tuple[bytes, Sequence[int]]:
        return form.text.encode("utf-8", "surrogatepass"), range(len(self._kinds) + 2)[::-1]


SUSPICIOUS = Suspicious()
PRIVATE = (
    "bob@example.com", "Ym9iQGV4YW1wbGUuY29t", "bob%40example.com", "+49 30 901820", "tel ", "4111 1111 1111 1111",
    "password=hunter2!x", "AKIA" + "ABCDEFGH" * 2, "10.1.2.3", "GB82 WEST 1234 5698 7654 32", "\\u0040", "&#64;", "1",
    "eyJhbGciOiJIUzI1NiJ9.e30.", "x" * 70, "\u200b", "\uff12", ":", "@", "-----BEGIN PRIVATE KEY-----", "\ud800",
    "born 1.2.1990",
)  # fmt: skip


@pytest.mark.parametrize("text", [text.text for text in labelled.texts()][::9])
def test_the_first_look_misses_nothing_that_is_labelled(text: str) -> None:
    """The pass over all patterns at once leaves out only kinds that the text does not hold."""
    assert DETECTOR.find(text) == SUSPICIOUS.find(text)


@settings(max_examples=150, deadline=None)
@given(joined(PRIVATE, most=8))
@example("tel \uff1210.1.2.3\uff12")
def test_the_first_look_misses_nothing(text: str) -> None:
    """Whatever stands beside whatever: it is found just as when every kind is looked for in every form."""
    assert DETECTOR.find(text) == SUSPICIOUS.find(text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="%&#;\\u004a1b64@.c \u0451\xdf\uff11\u200b=+-", max_size=80))
def test_any_text_is_read(text: str) -> None:
    """No text breaks the reading of codes: findings lie inside it."""
    assert all(0 <= one.start < one.end <= len(text) for one in DETECTOR.find(text))
