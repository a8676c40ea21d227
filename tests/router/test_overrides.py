"""Tenants and the shadow: a policy with changes."""

import pytest

from router.policy import InvalidPolicy, Policy, parse

POLICY = """
mode: prefer_edge
rules:
  - {name: long, when: {prompt_tokens: {">": 800}}, target: cloud}
  - {name: code, when: {code: true}, target: cloud}
"""
OWN = "rules: [{name: own, when: {maths: true}, target: edge}]"


def names(policy: Policy) -> list[str]:
    return [rule.name for rule in policy.rules]


def test_what_is_not_given_stays():
    """An override's own rules come first; everybody else keeps the policy itself."""
    policy = parse(POLICY + f"tenants: {{lab: {{mode: prefer_cloud, {OWN}}}}}")
    lab = policy.of("lab")
    assert (lab.mode, lab.fallback, names(lab)) == ("prefer_cloud", "edge", ["own", "long", "code"])
    assert policy.of("") is policy.of("another") is policy
    assert lab is policy.of("lab")


def test_a_rule_of_the_same_name_takes_the_common_ones_place():
    """And one without conditions makes the common ones needless."""
    always = "a: {rules: [{name: code, target: edge}]}"
    at_times = "b: {rules: [{name: code, when: 'code', target: edge}]}"
    policy = parse(POLICY + f"tenants: {{{always}, {at_times}}}")
    assert names(policy.of("a")) == ["code"]
    assert names(policy.of("b")) == ["code", "long"]
    assert policy.of("b").rules[0].target == "edge"


def test_only_modes_drop_the_common_rules_for_the_other_side():
    """A tenant that never leaves the device needs no copy of the policy."""
    assert names(parse(POLICY + "tenants: {lab: {mode: only_edge}}").of("lab")) == []


def test_the_shadow_is_over_the_tenants_own_policy():
    """It changes what would have held for that request, and has no shadow itself."""
    policy = parse(POLICY + f"shadow: {{mode: prefer_cloud}}\ntenants: {{lab: {{{OWN}}}}}")
    shadow = policy.of("lab").shadowing
    assert shadow is not None
    assert (shadow.mode, names(shadow), shadow.shadowing) == ("prefer_cloud", ["own", "long", "code"], None)
    assert policy.mode == policy.of("lab").mode == "prefer_edge"


@pytest.mark.parametrize(
    ("source", "field", "message"),
    [
        ("tenants: {lab: {mod: only_edge}}", "tenants.lab.mod", "did you mean mode?"),
        ("tenants: {'a b': {}}", "tenants.a b", "must match"),
        ("tenants: {l: {rules: [{name: a, target: cloud}, {name: b, target: edge}]}}", "tenants.l", "never reached"),
        ("tenants: {l: {mode: only_edge, rules: [{name: a, target: cloud}]}}", "tenants.l", "never sends"),
        ("shadow: {goal: {quality: 2}}", "shadow.goal.quality", "less than 1"),
        ("shadow: {rules: [{name: a, target: cloud, when: 'cod'}]}", "shadow.rules[0].when", "did you mean code?"),
    ],
)
def test_mistakes_are_named_where_they_stand(source, field, message):
    """In a tenant's part as in the policy's own."""
    with pytest.raises(InvalidPolicy) as caught:
        parse(POLICY + source)
    found = caught.value.problems[0]
    assert field in found.field
    assert message in found.message
    assert found.line == 6
