"""What is measured of a request depends on what its policy asks about."""

import math
from collections.abc import Sequence

import pytest

import router.difficulty
import router.observe
from router.decide import decide
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.observe import observe
from router.policy import parse
from router.weights import InvalidWeights
from shared.schemas import ChatRequest, Label, Message

MAIL = "Write to anna@example.org"


def observed(rules: str, text: str = MAIL, label: Label = "free") -> RequestFeatures:
    messages = (Message(role="user", content=text), Message(role="assistant", content="12"))
    request = ChatRequest(id="r", model="auto", messages=messages, label=label)
    return observe(request, parse(f"mode: prefer_edge\n{rules}"), prompt_tokens=9)


OFF = "privacy: {personal: free, secrets: free}\n"


@pytest.mark.parametrize(
    ("rules", "label", "kinds"),
    [
        ("", "free", ("email",)),
        (OFF, "free", ()),
        (OFF, "redact", ("email",)),
        (OFF + "rules: [{name: p, when: {personal: true}, target: edge}]", "free", ("email",)),
        ("privacy: {kinds: [phone]}", "free", ()),
        ("privacy: {kinds: [phone], words: [Write]}", "free", ("word",)),
    ],
)
def test_the_detector_is_asked_when_its_word_counts(rules: str, label: Label, kinds: tuple[str, ...]) -> None:
    """By the policy's care, by a rule's condition, or by the request's own label."""
    assert observed(rules, label=label).privacy.kinds == kinds


def test_the_difficulty_is_asked_when_its_word_counts() -> None:
    """By a rule's condition or by the goal, which also brings its threshold."""
    assert observed("").difficulty is None
    by_rule = observed('rules: [{name: h, when: {difficulty: {">": 0.5}}, target: cloud}]')
    assert by_rule.difficulty is not None
    assert by_rule.difficult_from is None
    few, many = (observed(f"goal: {{cloud_share: {share}}}").difficult_from for share in (0.1, 0.9))
    assert few is not None
    assert many is not None
    assert few > many
    assert observed("goal: {quality: 0.99}").difficult_from < observed("goal: {quality: 0.2}").difficult_from  # type: ignore[operator]


def test_harder_questions_score_higher() -> None:
    """The last thing the user said is what is scored."""
    rules = "goal: {cloud_share: 0.5}"
    hard = observed(rules, "Prove that every bounded sequence of complex numbers has a convergent subsequence.")
    easy = observed(rules, "Say hello.")
    assert hard.difficulty is not None
    assert easy.difficulty is not None
    assert hard.difficulty > easy.difficulty


def test_weights_that_cannot_be_read_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged weights file is no reason to refuse a request: the difficulty is unknown."""

    def damaged() -> None:
        raise InvalidWeights("cut short")

    monkeypatch.setattr(router.observe, "shipped_difficulty", damaged)
    features = observed("goal: {cloud_share: 0.5}")
    assert (features.difficulty, features.difficult_from) == (None, None)


def test_a_bucket_is_a_conversations_own() -> None:
    """It is drawn only where a rule asks for it, stays the same through a conversation, and spreads evenly."""
    rule = OFF + "rules: [{name: trial, when: {bucket: {'<': 10}}, target: cloud}]"
    assert observed(OFF).bucket is None
    policy = parse(f"mode: prefer_edge\n{rule}")
    first = Message(role="user", content="Why is the sky blue?")
    later = (first, Message(role="assistant", content="Air."), Message(role="user", content="And at night?"))
    asked = [ChatRequest(id=str(n), model="auto", messages=m) for n, m in enumerate([(first,), later])]
    assert len({observe(request, policy, prompt_tokens=9).bucket for request in asked}) == 1
    drawn = [observed(rule, text=f"question {n}").bucket or 0 for n in range(2000)]
    assert all(0 <= one < 100 for one in drawn)
    assert 150 < sum(one < 10 for one in drawn) < 250


def test_a_score_that_is_no_number_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negated condition would hold of it: so nobody is told of it, and the safe side is taken."""

    class Odd:
        def score(self, texts: Sequence[str]) -> list[float]:
            return [math.nan for _ in texts]

    monkeypatch.setattr(router.observe, "shipped_difficulty", Odd)
    assert observed("goal: {cloud_share: 0.5}").difficulty is None
    policy = parse("mode: prefer_edge\nrules: [{name: r, when: '!(difficulty < 0.9)', target: cloud}]")
    request = ChatRequest(id="r", model="auto", messages=(Message(role="user", content="hi"),))
    features = observe(request, policy, prompt_tokens=1)
    device, link = DeviceReading(model="small", context_length=4096), LinkReading(model="large")
    assert decide(features, policy, device=device, link=link).target == "edge"


def test_weights_that_cannot_be_read_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request does not wait for the same failure again."""
    tried = []

    def load() -> None:
        tried.append(1)
        raise InvalidWeights("cut short")

    monkeypatch.setattr(router.difficulty.Difficulty, "load", load)
    router.difficulty._shipped.cache_clear()
    try:
        for _ in range(3):
            assert observed("goal: {cloud_share: 0.5}").difficulty is None
    finally:
        router.difficulty._shipped.cache_clear()
    assert tried == [1]
