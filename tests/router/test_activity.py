"""router.activity: what recorded decisions come to."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.activity import mean_call_cost, spread, summarise
from router.classes import KNOWN, Class
from router.confidence import Heard, Judged
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.money import Price
from router.predict import Prediction, Predictions
from router.records import Outcome, Recorded, Shadowed
from shared.schemas import Target

EURO = Price(input_per_million=1000, output_per_million=1000, currency="EUR")


def record(target: Target = "edge", at: float = 0.0, first: float | None = 0.1, **others: object) -> Recorded:
    outcome = Outcome(served=target, ending="done", first_token_s=first, total_s=1.0, completion_tokens=10)
    base = Recorded(
        at=at,
        request=RequestFeatures(prompt_tokens=10),
        device=DeviceReading(model="small", context_length=2048),
        link=LinkReading(model="large"),
        policy="abc",
        target=target,
        rule="mode",
        outcome=outcome,
    )
    return replace(base, **others)  # type: ignore[arg-type]


def refused() -> Recorded:
    return replace(record(), target=None, rule="", refused="policy_denied", outcome=Outcome())


def by_tenant(name: str) -> RequestFeatures:
    return RequestFeatures(prompt_tokens=10, tenant=name)


def test_nothing_comes_to_nothing() -> None:
    """No records: no groups, no times, no division by zero."""
    activity = summarise([], KNOWN)

    assert (activity.decisions, activity.first_at, list(activity.targets), list(activity.periods)) == (0, None, [], [])


def test_decisions_are_counted_by_what_they_have_in_common() -> None:
    """By target, rule, tenant and class; every one is in one group of each kind."""
    named = by_tenant("lab")
    records = [record(), record("cloud", rule="goal"), record("cloud", request=named), refused()]

    activity = summarise(records, KNOWN)

    assert [(one.name, one.decisions) for one in activity.targets] == [("cloud", 2), ("edge", 1), ("refused", 1)]
    assert [(one.name, one.decisions, one.to_cloud) for one in activity.rules] == [
        ("mode", 2, 1), ("goal", 1, 1), ("refused", 1, 0)]  # fmt: skip
    assert [(one.name, one.decisions) for one in activity.tenants] == [("", 3), ("lab", 1)]
    for groups in (activity.targets, activity.rules, activity.tenants, activity.classes):
        assert sum(one.decisions for one in groups) == 4
        assert sum(one.refused for one in groups) == 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_percentiles_are_values_that_so_many_do_not_exceed(values: list[float]) -> None:
    """The least value that a half, 95 and 99 in a hundred are at or below."""
    found = spread(values)

    assert found is not None
    for part, value in ((50, found.p50), (95, found.p95), (99, found.p99)):
        enough = [one for one in values if 100 * sum(other <= one for other in values) >= part * len(values)]
        assert value == min(enough)


def test_waits_are_of_whoever_answered() -> None:
    """A cached answer is the cache's, and what broke is nobody's."""
    hit = replace(record().outcome, cache="hit", first_token_s=0.001)
    broken = replace(record().outcome, ending="unreachable")
    activity = summarise([record(), record("cloud", first=0.4), record(outcome=hit), record(outcome=broken)], KNOWN)

    times = {one.server: one.first_token_s and one.first_token_s.p50 for one in activity.waits}
    assert times == {"edge": 0.1, "cloud": 0.4, "cache": 0.001}
    assert sum(one.failed for one in activity.targets) == 1


def test_a_class_is_held_against_its_targets() -> None:
    """A request that failed before its first token missed them all; one that was given up says nothing."""
    outcome = record().outcome
    failed, left = (replace(outcome, first_token_s=None, ending=ending) for ending in ("unreachable", "cancelled"))
    records = [record(first=0.1), record(first=0.4), record(outcome=failed), record(outcome=left), refused()]

    (chat,) = summarise(records, KNOWN).attained

    assert (chat.name, chat.requests, chat.p50, chat.p95, chat.p99) == (
        "real_time_chat", 3, pytest.approx(1 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3))  # fmt: skip


def test_an_unknown_class_is_counted_and_not_held_against_anything() -> None:
    """A class that the policy has no longer keeps its requests in sight."""
    odd = RequestFeatures(prompt_tokens=1, scenario=Class("gone", guessed=False))
    activity = summarise([record(request=odd)], KNOWN)

    assert ([one.name for one in activity.classes], list(activity.attained)) == (["gone"], [])


def test_predictions_are_held_against_what_happened() -> None:
    """Of answers that went as decided: how far off, and how often too low."""
    said = Predictions(edge=Prediction(first_token_s=0.3, total_s=1.0))
    elsewhere = replace(record().outcome, served="cloud")
    records = [
        record(predictions=said),
        record(predictions=said, first=0.5),
        record(predictions=said, outcome=elsewhere),
    ]

    first, whole = summarise(records, KNOWN).forecasts

    assert (first.answers, first.too_low, first.dots) == (2, 0.5, ((0.3, 0.1), (0.3, 0.5)))
    assert (first.off_s.p50, whole.off_s.p99) == (pytest.approx(0.2), 0)


def test_periods_are_days_or_hours_and_keep_the_goal_apart() -> None:
    """Two days or less are shown by the hour; what a rule decided is no part of the goal's share."""
    by_goal = [record(target, at=3600.0 * hour, rule="goal") for hour, target in enumerate(("edge", "cloud", "cloud"))]
    short = summarise([*by_goal, record("cloud", at=10.0, rule="rule x")], KNOWN).periods
    long = summarise([record(at=86_400.0 * day) for day in range(4)], KNOWN).periods

    assert [(one.label, one.decisions, one.to_cloud, one.by_goal, one.goal_to_cloud) for one in short] == [
        ("1970-01-01 00:00", 2, 1, 1, 0),
        ("1970-01-01 01:00", 1, 1, 1, 1),
        ("1970-01-01 02:00", 1, 1, 1, 1),
    ]
    assert [one.label for one in long] == ["1970-01-01", "1970-01-02", "1970-01-03", "1970-01-04"]


def test_money_is_kept_apart_by_currency() -> None:
    """What had no price is in no sum; a request's cost in the cloud goes by the length that its answer had."""
    dollar = replace(EURO, currency="USD")
    paid = replace(record("cloud").outcome, cost=0.5)
    records = [record("cloud", price=price, outcome=paid) for price in (EURO, EURO, dollar)]

    assert summarise([*records, record()], KNOWN).cost == {"EUR": 1.0, "USD": 0.5}
    assert mean_call_cost([record(), record(outcome=Outcome())], EURO) == pytest.approx((0.02 + 0.266) / 2)
    assert mean_call_cost([], EURO) == 0


def test_cascades_and_shadows_are_counted() -> None:
    """How many answers were judged and not good enough; how often a shadow would have chosen otherwise."""
    poor = Judged(heard=Heard(tokens=3), p=0.2, threshold=0.6)
    shadowed = [record(shadow=Shadowed(target=target)) for target in ("cloud", "edge")]
    records = [record(judged=poor), record(judged=replace(poor, p=0.9)), *shadowed]

    activity = summarise(records, KNOWN)

    assert (activity.judgements.judged, activity.judgements.escalated) == (2, 1)
    assert (activity.shadowed, activity.shadow_differs) == (2, 1)
