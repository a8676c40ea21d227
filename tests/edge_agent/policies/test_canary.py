"""A policy on trial, as a value."""

import pytest

from edge_agent.policies.canary import WINDOW, Canary, Limits
from router.policy import parse
from shared.telemetry import RequestFinished

POLICY = parse("mode: prefer_edge")


def ended(code: str | None = None, first_token_s: float | None = 0.1) -> RequestFinished:
    outcome = "done" if code is None else "cancelled" if code == "cancelled" else "error"
    return RequestFinished("r", "auto", outcome, 1.0, first_token_s=first_token_s, error_code=code)


def after(events: list[RequestFinished], limits: Limits) -> Canary:
    canary = Canary(2, POLICY, 10, limits)
    for event in events:
        canary = canary.after(event)
    return canary


def test_it_takes_its_share_of_the_buckets() -> None:
    """None at 0, all at 100."""
    assert [Canary(2, POLICY, percent).takes(9.99) for percent in (0, 9.99, 10, 100)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("events", "limits", "breach"),
    [
        ([ended()] * 30, Limits(), None),
        ([ended("upstream_failed")] * 19, Limits(), None),
        ([ended("upstream_failed")] * 20, Limits(), "20 of 20 requests failed, more than 5.0%"),
        ([ended()] * 19 + [ended("policy_denied")], Limits(), None),
        ([ended()] * 18 + [ended("policy_denied")] * 2, Limits(), "2 of 20 requests failed, more than 5.0%"),
        ([ended("bad_request")] * 50, Limits(), None),
        ([ended("cancelled")] * 50, Limits(), None),
        ([ended("never heard of")] * 20, Limits(), "20 of 20 requests failed, more than 5.0%"),
        ([ended()] * 20, Limits(first_token_s=0.2), None),
        ([ended(first_token_s=0.5)] * 20, Limits(first_token_s=0.2), "half of the first tokens took over 0.50 s"),
        ([ended("upstream_failed")] * 20 + [ended()] * WINDOW, Limits(), None),
    ],
)
def test_what_ends_a_trial(events: list[RequestFinished], limits: Limits, breach: str | None) -> None:
    """Failures of the service in its latest requests, not what clients got wrong or broke off; and only after a few."""
    found = after(events, limits).breach()
    assert found == breach if breach is None else found is not None and found.startswith(breach)
