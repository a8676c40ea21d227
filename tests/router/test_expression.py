"""Conditions written as expressions: what is refused when written, and what holds when decided."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.conditions import FIELD_NAMES, samples
from router.decide import decide
from router.expression import MAX_CHARS, Expression, InvalidExpression, compiled
from router.facts import FACTS, Case
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.policy import InvalidPolicy, parse

DEVICE = DeviceReading(model="small", context_length=4096)
LINK = LinkReading(model="large", context_length=8192)


def policy(when: str, target: str = "cloud"):
    mode = "prefer_edge" if target == "cloud" else "prefer_cloud"
    return parse(f"mode: {mode}\nrules:\n  - name: r\n    target: {target}\n    when: {when!r}\n")


def decided(when: str, target: str = "cloud", device: DeviceReading = DEVICE, **request: object):
    features = RequestFeatures(**({"prompt_tokens": 900} | request))
    return decide(features, policy(when, target), device=device, link=LINK)


def problem(when: str) -> str:
    with pytest.raises(InvalidPolicy) as caught:
        policy(when)
    (found,) = caught.value.problems
    assert (found.line, found.field) == (5, "rules[0].when")
    return found.message


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        ("prompt_tokens > 800", "prompt_tokens 900"),
        ("prompt_tokens > 800 && !code", "code false, prompt_tokens 900"),
        ("code || prompt_tokens >= 900", "code false, prompt_tokens 900"),
        ("model in ['auto', 'x'] && label == 'free'", "label free, model auto"),
        ("model.matches('^a.t')", "model auto"),
        ("prompt_tokens > 2.0 * expected_output_tokens", "expected_output_tokens 256, prompt_tokens 900"),
        ("true", "always"),
        ("battery_percent == null || battery_percent > 50", ""),
    ],
)
def test_holds(when, reason):
    """The reason shows what was measured of every fact that the expression speaks of."""
    decision = decided(when)
    assert decision.target == "cloud"
    assert decision.reason == f"rule r: {reason or 'always'}"


@pytest.mark.parametrize("when", ["prompt_tokens > 900", "code", "round_trip_ms < 1e9", "!on_battery", "false"])
def test_does_not_hold(when):
    """Not where it is false, and not where what it asks for was not measured."""
    assert decided(when).rule == "mode"


def test_an_expression_that_fails_is_taken_for_the_safe_side():
    """A rule for the edge applies, one for the cloud does not: a mistake never sends a request away."""
    fails = "int(prompt_tokens) / int(battery_percent) > 3"
    empty = DeviceReading(model="small", context_length=4096, battery_percent=0.0)
    kept = decided(fails, "edge", device=empty)
    assert (kept.target, kept.reason) == ("edge", "rule r: its condition failed")
    assert decided(fails, "cloud", device=empty).rule == "mode"
    assert decided(fails, "cloud", device=DeviceReading(model="s", context_length=4096, battery_percent=9.0)).rule == (
        "rule r"
    )


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("prompt_tokens >", "at character 16: mismatched input"),
        ("prompt_tokens = 5", "at character 15: token recognition error at: '= '; write == to compare"),
        ("", "at character 1: "),
        ("promt_tokens > 5", "no fact promt_tokens; did you mean prompt_tokens?"),
        ("true || zzz", "no fact zzz; known are prompt_tokens"),
        ("prompt_tokens > 'x'", "different kinds"),
        ("code && prompt_tokens + 1 > 5", "write 2.0"),
        ("prompt_tokens", "must be true or false"),
        ("code ? prompt_tokens : 5.0", "must be true or false"),
        ("model.matches('(')", "regex"),
        ("model.matches('(a{1000}){1000}')", "regex"),
        ("[1, 2].exists(x, x > 1)", "no macros"),
        ("[[1]].map(x, x.map(y, y)) == []", "no macros"),
        ("timestamp('2020-01-01T00:00:00Z') != null", "no function timestamp"),
        ("code " + "&& code " * 200, f"longer than {MAX_CHARS} characters"),
        ("(" * 400 + "true" + ")" * 400, "at character"),
    ],
)
def test_mistakes_are_found_when_written(when, message):
    """Each is named, with its line, before the policy is in force."""
    assert message in problem(when)


@pytest.mark.parametrize("when", ["5", "[code]", "true"])
def test_a_condition_is_a_map_or_text(when):
    """`when: true` in YAML is neither."""
    with pytest.raises(InvalidPolicy, match="map of conditions, or an expression"):
        parse(f"mode: prefer_edge\nrules: [{{name: r, target: cloud, when: {when}}}]")


def test_every_fact_can_be_asked():
    """An expression may speak of whatever a map can; and its samples are of the fact's own kind."""
    assert set(samples()) == set(FACTS) == set(FIELD_NAMES)
    case = Case(RequestFeatures(prompt_tokens=1), policy("true"), DEVICE, LINK)
    for name, values in samples().items():
        assert compiled(f"{name} == {name}", samples()).asked == (name,)
        known = FACTS[name](case)
        assert known is None or isinstance(known, str | bool) is isinstance(values[0], str | bool)


def test_what_is_asked_is_measured():
    """A fact that costs something is computed for an expression as it is for a map."""
    assert policy("difficulty > 0.5").asks_difficulty
    assert parse("mode: prefer_edge\nprivacy: {personal: free, secrets: free}").asks_privacy is False
    off = "mode: prefer_edge\nprivacy: {personal: free, secrets: free}\nrules: [{name: r, target: edge, when: %s}]"
    assert parse(off % "secret || code").asks_privacy
    assert not parse(off % "code").asks_privacy


def test_the_written_text_is_what_a_policy_is_known_by():
    """Two expressions are two policies; the same text read twice is one."""
    assert policy("code").fingerprint == policy("code").fingerprint != policy("maths").fingerprint
    assert policy("code") == policy("code") != policy("maths")


WORDS = ["code", "prompt_tokens", "&&", "||", "!", ">", "(", ")", "[", "]", "'x'", "5", ".", "in", "?"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_any_text_is_an_expression_or_a_named_mistake(text):
    """Nothing that can be written gets further than InvalidExpression."""
    try:
        found = compiled(text, samples())
    except InvalidExpression:
        return
    assert isinstance(found, Expression)


def test_the_longest_expression_is_decided_in_no_time():
    """Linear in the text: the longest of the allowed ones takes no longer than a millisecond or so."""
    longest = compiled(("prompt_tokens > 1 && " * 60)[: MAX_CHARS - 10].rsplit("&&", 1)[0], samples())
    started = time.process_time()
    assert longest.holds({"prompt_tokens": 2.0})
    assert time.process_time() - started < 1
