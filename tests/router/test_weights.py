"""Weights of a policy: quality against time and money."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.clauses import Goal, Weights
from router.decide import Decision, decide
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.policy import InvalidPolicy, parse

PRICES = "prices: {cloud: {input_per_million: 1000, output_per_million: 2000, currency: EUR}}\n"
POLICY = (
    "mode: prefer_edge\n"
    + PRICES.replace("{", "{{").replace("}", "}}")
    + "weights: {{quality: {}, second: {}, money: {}}}"
)
ASKED = RequestFeatures(prompt_tokens=100, expected_output_tokens=51, difficulty=0.5)
DEVICE = DeviceReading(model="small", context_length=4096, prefill_tokens_per_s=100.0, token_s=0.1)
LINK = LinkReading(model="large", first_token_s=0.5, token_s=0.02)

worths = st.floats(0, 100)


def decided(policy: str, **features: float | None) -> Decision:
    return decide(replace(ASKED, **features), parse(policy), device=DEVICE, link=LINK)  # type: ignore[arg-type]


@given(quality=worths, second=worths, money=worths, difficulty=st.floats(0, 1))
def test_the_cloud_is_asked_where_its_gain_is_worth_more(
    quality: float, second: float, money: float, difficulty: float
) -> None:
    """Edge: 1 s of prompt, 50 tokens at 0.1 s. Cloud: 0.5 s, 50 tokens at 0.02 s; 100 and 51 tokens cost 0.202."""
    longer, cost = (0.5 + 1.0) - (1.0 + 5.0), 0.1 + 0.102
    worth = quality * difficulty - second * longer - money * cost
    decision = decided(POLICY.format(quality, second, money), difficulty=difficulty)
    if abs(worth) > 1e-6:
        assert (decision.target, decision.rule) == ("cloud" if worth > 0 else "edge", "weights")


def test_the_reason_says_what_counted() -> None:
    """Short and printable, with a sign for what speaks against the cloud."""
    reason = decided(POLICY.format(1, 0.1, 5)).reason
    assert reason == "weights: quality 0.5, time +0.45, money -1.01"


UNPLUGGED = replace(DEVICE, on_battery=True, battery_j=6000.0, work_w=10.0, radio_w=1.0)


@pytest.mark.parametrize(
    ("device", "target", "said"),
    [
        (UNPLUGGED, "cloud", "weights: quality 0.05, time +0, money +0, battery +0.195"),
        (replace(UNPLUGGED, radio_w=60.0), "edge", "weights: quality 0.05, time +0, money +0, battery -0.1"),
        (replace(UNPLUGGED, on_battery=False), "cloud", "weights: quality 0.05, time +0, money +0, battery +0"),
        (replace(UNPLUGGED, work_w=None), "cloud", "weights: quality 0.05, time +0, money +0, battery +0"),
        (replace(UNPLUGGED, on_battery=None), "cloud", "weights: quality 0.05, time +0, money +0, battery +0"),
    ],
)
def test_the_battery_counts_while_it_is_in_use(device: DeviceReading, target: str, said: str) -> None:
    """Edge: 6 s at 10 W; cloud: 1.5 s at 1 W or 60 W; of 6,000 J. Plugged in, or with one side unknown: nothing."""
    policy = parse("mode: prefer_edge\nweights: {quality: 0.1, battery: 0.2}")
    decision = decide(ASKED, policy, device=device, link=LINK)

    assert (decision.target, decision.reason) == (target, said)


def test_what_is_not_known_decides_nothing() -> None:
    """Without the difficulty, or a time that counts, the mode is left; a time that does not count is not needed."""
    assert decided(POLICY.format(1, 0, 0), difficulty=None).rule == "mode"
    unmeasured = DeviceReading(model="small", context_length=4096)
    timed = decide(ASKED, parse(POLICY.format(1, 1, 0)), device=unmeasured, link=LINK)
    untimed = decide(ASKED, parse(POLICY.format(1, 0, 0)), device=unmeasured, link=LINK)
    assert (timed.rule, untimed.rule, untimed.target) == ("mode", "weights", "cloud")


def test_a_rule_comes_first_and_the_cascade_after() -> None:
    ruled = POLICY.format(1, 0, 0) + "\nrules: [{name: here, target: edge}]"
    assert decided(ruled).rule == "rule here"
    judged = POLICY.format(0, 0, 1) + "\ncascade: {threshold: 0.6}"
    assert decided(judged).escalates


def test_a_tenant_may_have_a_goal_in_their_place_and_the_reverse() -> None:
    """Never both: what is given takes the place of the other."""
    weighed = parse(POLICY.format(1, 0, 0) + "\ntenants: {lab: {goal: {cloud_share: 0.2}}}")
    assert (weighed.of("lab").goal, weighed.of("lab").weights) == (Goal(cloud_share=0.2), None)
    aimed = parse("mode: prefer_edge\ngoal: {cloud_share: 0.2}\ntenants: {lab: {weights: {quality: 2}}}")
    assert (aimed.of("lab").goal, aimed.of("lab").weights) == (None, Weights(quality=2))
    assert aimed.of("lab").asks_difficulty


@pytest.mark.parametrize(
    ("policy", "field", "said"),
    [
        ("goal: {cloud_share: 0.2}\nweights: {quality: 1}", "weights", "either goal or weights"),
        ("weights: {quality: 1, money: 1}", "weights.money", "without prices"),
        ("weights: {second: 1}", "weights.quality", "is required"),
        ("weights: {quality: -1}", "weights.quality", "greater than or equal to 0"),
        ("weights: {quality: .nan}", "weights.quality", "finite"),
        ("weights: {quality: 1, seconds: 1}", "weights.seconds", "did you mean second?"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_its_field(policy: str, field: str, said: str) -> None:
    with pytest.raises(InvalidPolicy, match=said) as caught:
        parse("mode: prefer_edge\n" + policy)
    assert field in str(caught.value)
