# ruff: noqa: E501 - one case a line: the tables are read across
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import router.decide
from router.bars import BARS
from router.classes import Class
from router.clauses import PrivacyRules, Rule, Weights
from router.conditions import Range, When
from router.decide import Decision, decide
from router.facts import FACTS
from router.features import NO_CLOUD, DeviceReading, LinkReading, RequestFeatures
from router.money import Budgets, Prices, Tariff
from router.names import VIRTUAL_MODELS
from router.outages import OUTAGES
from router.policy import Policy
from router.predict import Prediction, Predictions
from router.preferences import PREFERENCES
from router.privacy.inspect import Privacy
from shared.errors import CausewayError, ContextTooLong, Overloaded, PolicyDenied, UnknownModel, Unreachable

ASK = RequestFeatures(prompt_tokens=100, expected_output_tokens=50)
IDLE = DeviceReading(model="small", context_length=1000, queue_capacity=4)
FULL = replace(IDLE, queue_depth=4)
GONE = replace(IDLE, available=False)
UP = LinkReading(round_trip_s=0.05, model="large", context_length=8000)
DOWN = replace(UP, connected=False)
OPEN = replace(UP, admitting=False, retry_after_s=7.0)
DRAINING = replace(UP, draining=True)
SLOW = replace(UP, round_trip_s=3.0)


def policy(mode: str = "prefer_edge", *rules: Rule, **fields) -> Policy:
    return Policy(mode=mode, rules=rules, **fields)


def rule(target: str, *, fallback: bool = True, **when) -> Rule:
    return Rule(name="r", target=target, fallback=fallback, when=When(**when))


def long(prompt_tokens: int, **fields) -> RequestFeatures:
    return replace(ASK, prompt_tokens=prompt_tokens, **fields)


PRICES = Prices(cloud=Tariff(input_per_million=1.0, output_per_million=2.0, currency="EUR"))
PREFER_EDGE = policy("prefer_edge")
WEIGHED = Policy(mode="prefer_edge", weights=Weights(quality=1))
PREFER_CLOUD = policy("prefer_cloud")
ONLY_EDGE = policy("only_edge")
ONLY_CLOUD = policy("only_cloud")
POOR = policy("prefer_cloud", prices=PRICES, budgets=Budgets(day=0.0))
CLOUD_OR_ERROR = policy("prefer_cloud", fallback="none")
PRIVATE = replace(ASK, label="edge_only")
MAIL = replace(ASK, privacy=Privacy(("email",)))
KEY = replace(ASK, privacy=Privacy(("aws_key",), secret=True))
UNREAD = replace(ASK, privacy=Privacy(undecided="300000 characters are more than the 200000 that are looked through"))
KEEP = policy("prefer_cloud", privacy=PrivacyRules(personal="edge_only", secrets="edge_only"))
SEND = policy("prefer_cloud", privacy=PrivacyRules(personal="free", secrets="free"))

# request, policy, device, link -> target, fallback, deciding rule, first reason
DECISIONS = {
    # the standing preference
    "prefer_edge": (ASK, PREFER_EDGE, IDLE, UP, "edge", None, "mode", "mode prefer_edge"),
    "prefer_cloud": (ASK, PREFER_CLOUD, IDLE, UP, "cloud", "edge", "mode", "mode prefer_cloud"),
    "prefer_cloud, no fallback": (ASK, CLOUD_OR_ERROR, IDLE, UP, "cloud", None, "mode", "mode prefer_cloud"),
    "only_edge": (ASK, ONLY_EDGE, IDLE, UP, "edge", None, "mode", "mode only_edge"),
    "only_edge, no cloud": (ASK, ONLY_EDGE, IDLE, NO_CLOUD, "edge", None, "mode", "mode only_edge"),
    "only_cloud": (ASK, ONLY_CLOUD, IDLE, UP, "cloud", None, "mode", "mode only_cloud"),
    "only_cloud, edge broken": (ASK, ONLY_CLOUD, GONE, UP, "cloud", None, "mode", "mode only_cloud"),
    # the label
    "edge_only": (PRIVATE, PREFER_EDGE, IDLE, UP, "edge", None, "label", "label edge_only: stays on the device"),
    "edge_only beats prefer_cloud": (PRIVATE, PREFER_CLOUD, IDLE, UP, "edge", None, "label", "label edge_only: stays on the device"),
    "edge_only beats a rule": (PRIVATE, policy("prefer_edge", rule("cloud", fallback=False)), IDLE, UP, "edge", None, "label", "label edge_only: stays on the device"),
    "the first bar is the reason": (PRIVATE, ONLY_EDGE, IDLE, UP, "edge", None, "label", "label edge_only: stays on the device"),
    # what was found in it
    "personal data stays": (MAIL, KEEP, IDLE, UP, "edge", None, "privacy", "stays on the device: email found"),
    "personal data may be sent": (MAIL, SEND, IDLE, UP, "cloud", "edge", "mode", "mode prefer_cloud"),
    "a secret stays": (KEY, policy("prefer_cloud", privacy=PrivacyRules(personal="free", secrets="edge_only")), IDLE, UP, "edge", None, "privacy", "stays on the device: aws_key found"),
    "many kinds": (replace(ASK, privacy=Privacy(("card", "email", "iban", "ip", "phone"))), KEEP, IDLE, UP, "edge", None, "privacy", "stays on the device: card, email, iban, ip and more found"),
    "not looked through": (UNREAD, PREFER_CLOUD, IDLE, UP, "edge", None, "privacy", "stays on the device: 300000 characters are more than the 200000 that are looked through"),
    "found beats a rule": (MAIL, policy("prefer_edge", rule("cloud"), privacy=KEEP.privacy), IDLE, UP, "edge", None, "privacy", "stays on the device: email found"),
    "rule on personal data": (MAIL, policy("prefer_cloud", rule("edge", personal=True)), IDLE, UP, "edge", None, "rule r", "rule r: personal true"),
    "rule on secrets": (MAIL, policy("prefer_cloud", rule("edge", secret=True)), IDLE, UP, "cloud", "edge", "mode", "mode prefer_cloud"),
    # the learned difficulty
    "hard by the goal": (replace(ASK, difficulty=0.61, difficult_from=0.44), PREFER_EDGE, IDLE, UP, "cloud", "edge", "goal", "goal: difficulty 0.61 >= 0.44"),
    "easy by the goal": (replace(ASK, difficulty=0.4, difficult_from=0.44), PREFER_CLOUD, IDLE, UP, "edge", None, "goal", "goal: difficulty 0.40 < 0.44"),
    "worth it by the weights": (replace(ASK, difficulty=0.5), WEIGHED, IDLE, UP, "cloud", "edge", "weights", "weights: quality 0.5, time +0, money +0"),
    "difficulty without a goal": (replace(ASK, difficulty=0.9), PREFER_EDGE, IDLE, UP, "edge", None, "mode", "mode prefer_edge"),
    "rule on difficulty": (replace(ASK, difficulty=0.9), policy("prefer_edge", rule("cloud", difficulty=Range(**{">": 0.8}))), IDLE, UP, "cloud", "edge", "rule r", "rule r: difficulty 0.9 > 0.8"),
    # no cloud
    "prefer_edge, no cloud": (ASK, PREFER_EDGE, IDLE, NO_CLOUD, "edge", None, "no_cloud", "no cloud is in use"),
    "prefer_cloud, no cloud": (ASK, CLOUD_OR_ERROR, IDLE, NO_CLOUD, "edge", None, "no_cloud", "no cloud is in use"),
    # the requested model
    "model edge": (replace(ASK, model="edge"), PREFER_CLOUD, IDLE, UP, "edge", None, "requested_model", "model edge requested"),
    "model small": (replace(ASK, model="small"), PREFER_CLOUD, IDLE, UP, "edge", None, "requested_model", "model small requested"),
    "model cloud": (replace(ASK, model="cloud"), PREFER_EDGE, IDLE, UP, "cloud", "edge", "requested_model", "model cloud requested"),
    "model cloud, no fallback": (replace(ASK, model="cloud"), CLOUD_OR_ERROR, IDLE, UP, "cloud", None, "requested_model", "model cloud requested"),
    "model cloud, too long for the edge": (long(1000, model="cloud"), PREFER_EDGE, IDLE, UP, "cloud", None, "edge_context", "needs 1001 tokens, the edge takes 1000"),
    "model cloud, slow link": (replace(ASK, model="cloud"), PREFER_EDGE, IDLE, SLOW, "cloud", "edge", "requested_model", "model cloud requested"),
    "model cloud, down": (replace(ASK, model="cloud"), PREFER_EDGE, IDLE, DOWN, "edge", None, "cloud_disconnected", "cloud is not connected"),
    "model large": (replace(ASK, model="large"), PREFER_EDGE, IDLE, UP, "cloud", None, "requested_model", "model large requested"),
    "model on both sides": (replace(ASK, model="small"), PREFER_CLOUD, IDLE, replace(UP, model="small"), "cloud", "edge", "mode", "mode prefer_cloud"),
    "model beats a rule": (replace(ASK, model="edge"), policy("prefer_edge", rule("cloud")), IDLE, UP, "edge", None, "requested_model", "model edge requested"),
    "odd model name": (replace(ASK, model="l\r\nX: y\u00e9"), PREFER_EDGE, IDLE, replace(UP, model="l\r\nX: y\u00e9"), "cloud", None, "requested_model", "model l\\r\\nX: y\\xe9 requested"),
    # the context
    "too long for the edge": (long(1000), PREFER_EDGE, IDLE, UP, "cloud", None, "edge_context", "needs 1001 tokens, the edge takes 1000"),
    "just fits the edge": (long(950), PREFER_EDGE, IDLE, UP, "edge", None, "mode", "mode prefer_edge"),
    "fits to the last token": (long(999), ONLY_EDGE, IDLE, UP, "edge", None, "mode", "mode only_edge"),
    "asked for too much": (long(950, max_tokens=51), PREFER_EDGE, IDLE, UP, "cloud", None, "edge_context", "needs 1001 tokens, the edge takes 1000"),
    "answer may be cut": (long(951), PREFER_EDGE, IDLE, UP, "cloud", "edge", "roomier_context", "may need 1001 tokens, the edge takes 1000"),
    "answer may be cut, no other way": (long(951), ONLY_EDGE, IDLE, UP, "edge", None, "mode", "mode only_edge"),
    "answer may be cut in the cloud": (long(951), PREFER_CLOUD, replace(IDLE, context_length=9000), replace(UP, context_length=1000), "edge", None, "roomier_context", "may need 1001 tokens, the cloud takes 1000"),
    "answer may be cut on both sides": (long(951), PREFER_CLOUD, IDLE, replace(UP, context_length=1000), "cloud", "edge", "mode", "mode prefer_cloud"),
    "too long for the cloud": (long(1000), PREFER_CLOUD, replace(IDLE, context_length=9000), replace(UP, context_length=1000), "edge", None, "cloud_context", "needs 1001 tokens, the cloud takes 1000"),
    "cloud context unknown": (long(5000), PREFER_EDGE, IDLE, replace(UP, context_length=None), "cloud", None, "edge_context", "needs 5001 tokens, the edge takes 1000"),
    "context beats a rule": (long(1000), policy("prefer_edge", rule("edge")), IDLE, UP, "cloud", None, "edge_context", "needs 1001 tokens, the edge takes 1000"),
    # the administrator's rules
    "rule to the cloud": (ASK, policy("prefer_edge", rule("cloud", prompt_tokens=Range(**{">=": 100}))), IDLE, UP, "cloud", "edge", "rule r", "rule r: prompt_tokens 100 >= 100"),
    "rule to the edge": (ASK, policy("prefer_cloud", rule("edge", code=False)), IDLE, UP, "edge", None, "rule r", "rule r: code false"),
    "rule not met": (ASK, policy("prefer_edge", rule("cloud", code=True)), IDLE, UP, "edge", None, "mode", "mode prefer_edge"),
    "rule beats the roomier context": (long(951), policy("prefer_cloud", rule("edge")), IDLE, UP, "edge", None, "rule r", "rule r: always"),
    "firm rule to the cloud": (ASK, policy("prefer_edge", rule("cloud", fallback=False)), IDLE, UP, "cloud", None, "rule r", "rule r: always"),
    "firm rule to the edge": (ASK, policy("prefer_cloud", rule("edge", fallback=False)), IDLE, UP, "edge", None, "rule r", "rule r: always"),
    # outages: the other side stands in
    "edge full": (ASK, PREFER_EDGE, FULL, UP, "cloud", "edge", "edge_queue_full", "edge queue full (4 of 4)"),
    "edge full, by rule": (ASK, policy("prefer_cloud", rule("edge")), FULL, UP, "cloud", "edge", "edge_queue_full", "edge queue full (4 of 4)"),
    "edge full, slow link": (ASK, PREFER_EDGE, FULL, SLOW, "cloud", "edge", "edge_queue_full", "edge queue full (4 of 4)"),
    "edge broken": (ASK, PREFER_EDGE, GONE, UP, "cloud", None, "edge_unavailable", "the edge model is not available"),
    "too slow here": (replace(ASK, scenario=Class("real_time_chat", guessed=False)), PREFER_EDGE, replace(IDLE, prefill_tokens_per_s=100.0), replace(UP, first_token_s=0.3), "cloud", "edge", "scenario", "class real_time_chat: edge first token 1000 ms > 500 ms"),
    "no money": (ASK, POOR, IDLE, UP, "edge", None, "budget", "budget: 0.00 of 0.00 EUR spent today, this may cost 0.0002"),
    "cloud down": (ASK, PREFER_CLOUD, IDLE, DOWN, "edge", None, "cloud_disconnected", "cloud is not connected"),
    "cloud down, by rule": (ASK, policy("prefer_edge", rule("cloud")), IDLE, DOWN, "edge", None, "cloud_disconnected", "cloud is not connected"),
    "breaker open": (ASK, PREFER_CLOUD, IDLE, OPEN, "edge", None, "breaker_open", "cloud failed lately, breaker open"),
    "draining": (ASK, PREFER_CLOUD, IDLE, DRAINING, "edge", None, "cloud_draining", "cloud is draining"),
    "slow link": (ASK, PREFER_CLOUD, IDLE, SLOW, "edge", None, "slow_link", "round trip 3000 ms > 2000 ms"),
    "slow link, edge full": (ASK, PREFER_CLOUD, FULL, SLOW, "cloud", "edge", "mode", "mode prefer_cloud"),
    "slow link, only_cloud": (ASK, ONLY_CLOUD, IDLE, SLOW, "cloud", None, "mode", "mode only_cloud"),
    "slow link, no fallback": (ASK, CLOUD_OR_ERROR, IDLE, SLOW, "cloud", None, "mode", "mode prefer_cloud"),
    "link unmeasured": (ASK, PREFER_CLOUD, IDLE, replace(UP, round_trip_s=None), "cloud", "edge", "mode", "mode prefer_cloud"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECISIONS)
def test_decisions(name):
    """Each rule and mode sends the request where it should, says why, and permits only the right fallback."""
    features, rules, device, link, target, fallback, by, reason = DECISIONS[name]
    decision = decide(features, rules, device=device, link=link)
    assert (decision.target, decision.fallback, decision.rule, decision.reason) == (target, fallback, by, reason)


@pytest.mark.parametrize(
    ("features", "rules", "redact"),
    [
        (ASK, PREFER_CLOUD, False),
        (MAIL, PREFER_CLOUD, True),
        (KEY, PREFER_CLOUD, True),
        (MAIL, PREFER_EDGE, False),
        (MAIL, SEND, False),
        (replace(ASK, label="redact"), SEND, True),
        (replace(MAIL, label="redact"), KEEP, False),
    ],
)
def test_redaction_is_part_of_the_decision(features, rules, redact):
    """What is sent is redacted if its label, or the policy for what was found in it, says so; the stricter counts."""
    assert decide(features, rules, device=IDLE, link=UP).redact is redact


# request, policy, device, link -> error, what its message says of each side
REFUSALS = {
    "edge_only, only_cloud": (PRIVATE, ONLY_CLOUD, IDLE, UP, PolicyDenied, "not the edge: mode only_cloud; not the cloud: label edge_only"),
    "edge_only, model cloud": (replace(PRIVATE, model="cloud"), PREFER_EDGE, IDLE, UP, PolicyDenied, "not the edge: model cloud requested"),
    "edge_only, model large": (replace(PRIVATE, model="large"), PREFER_EDGE, IDLE, UP, PolicyDenied, "not the edge: model large requested"),
    "edge_only, too long": (replace(PRIVATE, prompt_tokens=1000), PREFER_EDGE, IDLE, UP, ContextTooLong, "needs 1001 tokens, the edge takes 1000; not the cloud: label edge_only"),
    "edge_only, edge full": (PRIVATE, PREFER_EDGE, FULL, UP, Overloaded, "edge queue full (4 of 4); not the cloud: label edge_only"),
    "edge_only, edge broken": (PRIVATE, PREFER_CLOUD, GONE, UP, Overloaded, "not available; not the cloud: label edge_only"),
    "private, only_cloud": (MAIL, policy("only_cloud", privacy=KEEP.privacy), IDLE, UP, PolicyDenied, "not the cloud: stays on the device: email found"),
    "only_edge, model cloud": (replace(ASK, model="cloud"), ONLY_EDGE, IDLE, UP, PolicyDenied, "not the cloud: mode only_edge"),
    "only_cloud, model edge": (replace(ASK, model="edge"), ONLY_CLOUD, IDLE, UP, PolicyDenied, "not the edge: mode only_cloud"),
    "only_edge, full": (ASK, ONLY_EDGE, FULL, UP, Overloaded, "edge queue full (4 of 4); not the cloud: mode only_edge"),
    "only_cloud, down": (ASK, ONLY_CLOUD, IDLE, DOWN, Unreachable, "cloud is not connected; not the edge: mode only_cloud"),
    "only_cloud, none": (ASK, ONLY_CLOUD, IDLE, NO_CLOUD, PolicyDenied, "not the edge: mode only_cloud; not the cloud: no cloud is in use"),
    "too long for both": (long(9000), PREFER_EDGE, IDLE, UP, ContextTooLong, "needs 9001 tokens, the edge takes 1000; not the cloud: needs 9001 tokens, the cloud takes 8000"),
    "too long, only_edge": (long(1000), ONLY_EDGE, IDLE, UP, ContextTooLong, "the edge takes 1000; not the cloud: mode only_edge"),
    "too long, cloud down": (long(1000), PREFER_EDGE, IDLE, DOWN, Unreachable, "not connected; not the edge: needs 1001 tokens, the edge takes 1000"),
    "too long, no cloud": (long(1000), PREFER_EDGE, IDLE, NO_CLOUD, ContextTooLong, "needs 1001 tokens, the edge takes 1000; not the cloud: no cloud is in use"),
    "no cloud, full": (ASK, PREFER_EDGE, FULL, NO_CLOUD, Overloaded, "edge queue full (4 of 4); not the cloud: no cloud is in use"),
    "no cloud, model cloud": (replace(ASK, model="cloud"), PREFER_EDGE, IDLE, NO_CLOUD, PolicyDenied, "not the cloud: no cloud is in use"),
    "no cloud, firm cloud rule": (ASK, policy("prefer_edge", rule("cloud", fallback=False)), IDLE, NO_CLOUD, PolicyDenied, "not the edge: rule r: always"),
    "model cloud, down, no fallback": (replace(ASK, model="cloud"), CLOUD_OR_ERROR, IDLE, DOWN, Unreachable, "not connected; not the edge: model cloud requested"),
    "model large, down": (replace(ASK, model="large"), PREFER_EDGE, IDLE, DOWN, Unreachable, "not connected; not the edge: model large requested"),
    "model cloud, too long": (long(8000, model="cloud"), PREFER_EDGE, IDLE, UP, ContextTooLong, "the cloud takes 8000"),
    "model edge, full": (replace(ASK, model="edge"), PREFER_EDGE, FULL, UP, Overloaded, "not the cloud: model edge requested"),
    "firm edge rule, full": (ASK, policy("prefer_edge", rule("edge", fallback=False)), FULL, UP, Overloaded, "not the cloud: rule r: always"),
    "firm edge rule, too long": (long(1000), policy("prefer_edge", rule("edge", fallback=False)), IDLE, UP, ContextTooLong, "not the cloud: rule r: always"),
    "firm edge rule, model cloud": (replace(ASK, model="cloud"), policy("prefer_edge", rule("edge", fallback=False)), IDLE, UP, PolicyDenied, "not the cloud: rule r: always"),
    "firm cloud rule, down": (ASK, policy("prefer_edge", rule("cloud", fallback=False)), IDLE, DOWN, Unreachable, "not the edge: rule r: always"),
    "fallback none, down": (ASK, CLOUD_OR_ERROR, IDLE, DOWN, Unreachable, "cloud is not connected; not the edge: fallback none"),
    "fallback none, breaker": (ASK, CLOUD_OR_ERROR, IDLE, OPEN, Unreachable, "breaker open; not the edge: fallback none"),
    "fallback none, draining": (ASK, CLOUD_OR_ERROR, IDLE, DRAINING, Overloaded, "draining; not the edge: fallback none"),
    "both out, edge first": (ASK, PREFER_EDGE, FULL, DOWN, Overloaded, "edge queue full (4 of 4); not the cloud: cloud is not connected"),
    "both out, cloud first": (ASK, PREFER_CLOUD, GONE, DOWN, Unreachable, "not connected; not the edge: the edge model is not available"),
    "unknown model": (replace(ASK, model="gpt\n"), PREFER_EDGE, IDLE, UP, UnknownModel, "no model 'gpt\\n'; there are auto, edge, cloud, small, large"),
    "unknown model, no cloud": (replace(ASK, model="gpt"), PREFER_EDGE, IDLE, NO_CLOUD, UnknownModel, "no model 'gpt'"),
    "unknown model, only_edge": (replace(ASK, model="gpt"), ONLY_EDGE, IDLE, replace(DOWN, model=None), UnknownModel, "no model 'gpt'"),
    "unknown model, edge_only": (replace(PRIVATE, model="gpt"), PREFER_EDGE, IDLE, replace(DOWN, model=None), UnknownModel, "no model 'gpt'"),
    "perhaps the cloud's model": (replace(ASK, model="gpt"), PREFER_EDGE, IDLE, replace(DOWN, model=None), Unreachable, "the cloud has not said"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    """When nobody may or can answer, the error has the right name and says why of both sides."""
    features, rules, device, link, error, said = REFUSALS[name]
    with pytest.raises(CausewayError) as caught:
        decide(features, rules, device=device, link=link)
    assert type(caught.value) is error
    assert said in caught.value.message


def test_each_rule_of_the_tables_decides_somewhere():
    """The cases above reach every named rule of the three tables."""
    decided = {case[6] for case in DECISIONS.values()}
    named = {rule.__name__ for table in (BARS, *OUTAGES.values()) for rule in table} - {"firm_rule"}
    assert len(PREFERENCES) == 6
    assert named <= decided
    assert {"rule r", "roomier_context", "scenario", "goal", "weights", "mode"} <= decided


def test_the_readme_names_every_rule_and_condition():
    """What an administrator reads is what is there."""
    readme = (Path(router.decide.__file__).parent / "README.md").read_text()
    rules = {rule.__name__ for table in (BARS, PREFERENCES, *OUTAGES.values()) for rule in table}
    assert {name for name in rules | set(FACTS) if f"`{name}`" not in readme} == set()


def test_errors_say_who_failed_and_when_to_come_back():
    """An open breaker's time travels to the client; an edge's overload is the edge's."""
    with pytest.raises(Unreachable) as cloud:
        decide(ASK, ONLY_CLOUD, device=IDLE, link=OPEN)
    assert (cloud.value.source, cloud.value.retry_after) == ("cloud", 7.0)
    with pytest.raises(Overloaded) as edge:
        decide(ASK, ONLY_EDGE, device=FULL, link=OPEN)
    assert (edge.value.source, edge.value.retry_after) == ("edge", None)


def test_a_stand_in_tells_what_was_wanted():
    """The first reason is the outage, the next what had been chosen."""
    decision = decide(ASK, policy("prefer_edge", rule("cloud")), device=IDLE, link=DOWN)
    assert decision.reasons == ("cloud is not connected", "rule r: always")


def test_a_slow_link_without_alternative_is_mentioned():
    """Going there all the same is said openly."""
    assert decide(ASK, ONLY_CLOUD, device=IDLE, link=SLOW).reasons == (
        "mode only_cloud",
        "round trip 3000 ms > 2000 ms",
    )


def test_predictions():
    """First-token times are given where something was measured."""
    device = replace(IDLE, prefill_tokens_per_s=200.0)
    decision = decide(ASK, PREFER_EDGE, device=device, link=replace(UP, first_token_s=0.25))
    assert decision.predictions == Predictions(edge=Prediction(first_token_s=0.5), cloud=Prediction(first_token_s=0.25))
    bare = decide(ASK, PREFER_EDGE, device=IDLE, link=UP)
    assert bare.predictions == Predictions()


NUMBERS = st.integers(0, 3000)
RANGES = st.builds(lambda sign, number: Range(**{sign: number}), st.sampled_from([">", ">=", "<", "<=", "=="]), NUMBERS)
SECONDS = st.none() | st.floats(0, 10)
WHENS = st.fixed_dictionaries(
    {},
    optional={
        "prompt_tokens": RANGES,
        "turns": RANGES,
        "queue_depth": RANGES,
        "round_trip_ms": RANGES,
        "edge_first_token_ms": RANGES,
        "code": st.booleans(),
        "json": st.booleans(),
        "fits_edge": st.booleans(),
        "on_battery": st.booleans(),
        "label": st.sampled_from(["free", "edge_only"]),
        "model": st.sampled_from([("auto",), ("cloud", "large"), ("small",)]),
    },
).map(lambda fields: When(**fields))


@st.composite
def policies(draw) -> Policy:
    mode = draw(st.sampled_from(["prefer_edge", "prefer_cloud", "only_edge", "only_cloud"]))
    targets = [mode.removeprefix("only_")] if mode.startswith("only_") else ["edge", "cloud"]
    conditions = [when for when in draw(st.lists(WHENS, max_size=4)) if when != When()]
    rules = tuple(
        Rule(name=f"r{number}", when=when, target=draw(st.sampled_from(targets)), fallback=draw(st.booleans()))
        for number, when in enumerate(conditions)
    )
    limit = draw(st.floats(1, 5000))
    return Policy(mode=mode, rules=rules, fallback=draw(st.sampled_from(["edge", "none"])), max_round_trip_ms=limit)


REQUESTS = st.builds(
    RequestFeatures,
    prompt_tokens=NUMBERS,
    model=st.sampled_from([*VIRTUAL_MODELS, "small", "large", "other"]),
    label=st.sampled_from(["free", "edge_only"]),
    max_tokens=st.none() | st.integers(1, 3000),
    expected_output_tokens=st.integers(1, 500),
    turns=st.integers(1, 20),
    code=st.booleans(),
    json=st.booleans(),
)
DEVICES = st.builds(
    DeviceReading,
    model=st.just("small"),
    context_length=st.sampled_from([500, 2000, 9000]),
    available=st.booleans(),
    queue_depth=st.integers(0, 4),
    queue_capacity=st.integers(1, 4),
    tokens_per_s=st.none() | st.floats(0, 100),
    prefill_tokens_per_s=st.none() | st.floats(0, 1000),
    on_battery=st.none() | st.booleans(),
)
LINKS = st.builds(
    LinkReading,
    configured=st.booleans(),
    connected=st.booleans(),
    admitting=st.booleans(),
    draining=st.booleans(),
    round_trip_s=SECONDS,
    first_token_s=SECONDS,
    model=st.sampled_from([None, "large", "small"]),
    context_length=st.sampled_from([None, 500, 8000]),
)


def outcome(features, rules, device, link) -> Decision | tuple[type, str]:
    try:
        return decide(features, rules, device=device, link=link)
    except CausewayError as error:
        return type(error), error.message


@settings(max_examples=400, deadline=None)
@given(REQUESTS.map(lambda request: replace(request, label="edge_only")), policies(), DEVICES, LINKS)
def test_edge_only_never_leaves_the_device(features, rules, device, link):
    """Whatever the policy, the device and the link: the cloud is neither target nor fallback."""
    result = outcome(features, rules, device, link)
    if isinstance(result, Decision):
        assert (result.target, result.fallback) == ("edge", None)


@settings(max_examples=400, deadline=None)
@given(REQUESTS, policies(), DEVICES, LINKS)
def test_invariants(features, rules, device, link):
    """The same values give the same decision, and no decision breaks a limit that the values state."""
    result = outcome(features, rules, device, link)
    assert result == outcome(features, rules, device, link)
    if not isinstance(result, Decision):
        assert issubclass(result[0], CausewayError)
        return
    answering = {result.target, result.fallback} - {None}
    assert result.fallback in {None, "edge"}
    assert result.fallback != result.target
    assert all(reason.isascii() and reason.isprintable() for reason in (*result.reasons, result.rule))
    if rules.mode.startswith("only_"):
        assert answering == {rules.mode.removeprefix("only_")}
    if features.model == "edge" or (features.model == "cloud" and rules.fallback == "none"):
        assert answering == {features.model}
    if "edge" in answering:
        assert features.required_context <= device.context_length
        assert device.available
    if result.target == "cloud":
        assert link.configured
        assert link.connected
        assert link.admitting
        assert not link.draining
        assert link.context_length is None or features.required_context <= link.context_length
    if result.target == "edge":
        assert not device.queue_full
