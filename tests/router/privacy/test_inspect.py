"""A whole request: every text of it is looked through, and the same texts are redacted."""

from collections import Counter

import pytest

import router.privacy.checks
from router.privacy.detect import MAX_CHARS, Detector, Finding, Undecided
from router.privacy.inspect import inspect, redacted
from shared.schemas import ChatRequest, Message, Sampling

DETECTOR = Detector()
ADDRESS = "anna@example.org"


def chat(*contents: str, stop: tuple[str, ...] = (), name: str | None = None, key: str = "r1") -> ChatRequest:
    roles = ("system", "user", "assistant", "tool")
    messages = [Message(role=roles[i % 4], content=text, name=name) for i, text in enumerate(contents)]
    return ChatRequest(id=key, model="auto", messages=tuple(messages), sampling=Sampling(stop=stop))


class Broken(Detector):
    def find(self, text: str, checked: Counter[int] | None = None) -> list[Finding]:
        raise MemoryError


PLACES = {
    "system": chat(f"I am {ADDRESS}", "hi"),
    "user": chat("be kind", f"I am {ADDRESS}"),
    "assistant": chat("be kind", "hi", f"write to {ADDRESS}"),
    "tool": chat("be kind", "hi", "hello", f'{{"mail": "{ADDRESS}"}}'),
    "name": chat("be kind", name=ADDRESS),
    "stop": chat("be kind", stop=(ADDRESS,)),
    "prompt": ChatRequest(id="r1", model="auto", prompt=f"I am {ADDRESS}"),
    "id": chat("be kind", key=ADDRESS),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_text_is_looked_through_and_redacted(place: str) -> None:
    """Wherever in a request it stands, an address is found and does not leave."""
    request = PLACES[place]
    assert inspect(request, DETECTOR).kinds == ("email",)
    hidden, _ = redacted(request, DETECTOR, b"secret")
    assert ADDRESS not in str(hidden)
    assert inspect(hidden, DETECTOR).kinds == ()


def test_a_clean_request_is_unchanged() -> None:
    request = chat("be kind", "what is 2 + 2?")
    assert inspect(request, DETECTOR) == inspect(request, DETECTOR).__class__()
    hidden, made = redacted(request, DETECTOR, b"secret")
    assert hidden == request
    assert made.values == {}


def test_secrets_are_told_apart() -> None:
    assert not inspect(PLACES["user"], DETECTOR).secret
    assert inspect(chat("k", "AKIA" + "ABCDEFGH" * 2), DETECTOR).secret


def test_what_breaks_makes_the_request_private() -> None:
    """P-4: a detector that raises, or a text too long for it, is no permission to send. No text is in the reason."""
    assert inspect(PLACES["user"], Broken()).undecided == "the detector failed: MemoryError"
    too_long = inspect(chat("be kind", "a" * (MAX_CHARS + 1)), DETECTOR)
    assert too_long.undecided is not None
    with pytest.raises(Undecided):
        redacted(chat("be kind", "a" * (MAX_CHARS + 1)), DETECTOR, b"secret")


def test_all_turns_of_a_conversation_have_the_same_placeholders() -> None:
    """The second turn repeats the first, so that a model sees one name for one value, and prefixes stay cached."""
    first, _ = redacted(chat("be kind", f"I am {ADDRESS}"), DETECTOR, b"secret")
    second, made = redacted(
        chat("be kind", f"I am {ADDRESS}", f"Hello {ADDRESS}", "ok", "x@example.com"), DETECTOR, b"secret"
    )
    assert second.messages[:2] == first.messages[:2]
    assert len(made.values) == 2
    other, _ = redacted(chat("be quick", f"I am {ADDRESS}"), DETECTOR, b"secret")
    assert other.messages[1] != first.messages[1]


def test_many_short_texts_cost_no_more_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of messages, each with few enough candidates to check them all, are checked as one text is."""
    asked: list[str] = []
    is_number = router.privacy.checks._is_number

    def counted(text: str, region: str | None) -> bool:
        asked.append(text)
        return is_number(text, region)

    monkeypatch.setattr(router.privacy.checks, "_is_number", counted)
    found = inspect(chat(*["tel. (000) 123 45 67" for _ in range(3000)]), DETECTOR)
    assert found.personal
    assert 0 < len(set(asked)) <= len(asked) <= 2 * 24 * 13


def test_the_limits_hold_for_all_texts_together() -> None:
    """Neither many long texts nor many findings are a way around them."""
    for texts in (["a" * 1000] * 300, [f"{ADDRESS} " * 40] * 40):
        assert inspect(chat(*texts), DETECTOR).undecided is not None
        with pytest.raises(Undecided):
            redacted(chat(*texts), DETECTOR, b"secret")
