import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.gateway.limits import Bucket, Limiter, TenantLimits
from shared.errors import Overloaded, RateLimited


def test_a_tenant_may_run_so_many_at_once() -> None:
    """One more is refused with when to come back, and lets another tenant alone; leaving makes room."""
    limiter = Limiter(TenantLimits(concurrent=2))
    limiter.enter("a", 10, 0.0)
    limiter.enter("a", 10, 0.0)
    with pytest.raises(RateLimited) as refused:
        limiter.enter("a", 10, 0.0)
    assert refused.value.retry_after
    limiter.enter("b", 10, 0.0)
    limiter.leave("a", 10, 10)
    limiter.enter("a", 10, 0.0)
    assert (limiter.running("a"), limiter.running("b"), limiter.running("c")) == (2, 1, 0)


def test_requests_a_minute() -> None:
    """After a burst of the whole minute, retry_after is exactly when the next one fits."""
    limiter = Limiter(TenantLimits(concurrent=0, requests_per_minute=30))
    for _ in range(30):
        limiter.enter("a", 0, 0.0)
    with pytest.raises(RateLimited) as refused:
        limiter.enter("a", 0, 0.0)
    assert refused.value.retry_after == pytest.approx(2.0)
    with pytest.raises(RateLimited):
        limiter.enter("a", 0, 1.9)
    limiter.enter("a", 0, 2.0)


def test_tokens_are_reserved_then_settled() -> None:
    """A reservation that was too large is given back, one that was too small is charged."""
    limiter = Limiter(TenantLimits(tokens_per_minute=100))
    limiter.enter("a", 90, 0.0)
    with pytest.raises(RateLimited):
        limiter.enter("a", 20, 0.0)
    limiter.leave("a", 90, 10)
    limiter.enter("a", 90, 0.0)
    limiter.leave("a", 90, 150)
    with pytest.raises(RateLimited) as refused:
        limiter.enter("a", 1, 0.0)
    assert refused.value.retry_after == pytest.approx(61 * 0.6)


def test_a_request_larger_than_a_minute_waits_for_a_full_bucket() -> None:
    """It is not refused for ever."""
    limiter = Limiter(TenantLimits(tokens_per_minute=100))
    limiter.enter("a", 1_000_000, 0.0)
    limiter.leave("a", 1_000_000, 1_000_000)
    with pytest.raises(RateLimited):
        limiter.enter("a", 1_000_000, 59.0)
    limiter.enter("a", 1_000_000, 60.0)


def test_a_refused_request_costs_nothing() -> None:
    """Neither a request nor tokens are taken when either is short."""
    limiter = Limiter(TenantLimits(requests_per_minute=1, tokens_per_minute=60))
    limiter.enter("a", 60, 0.0)
    for _ in range(5):
        with pytest.raises(RateLimited):
            limiter.enter("a", 60, 59.0)
    limiter.enter("a", 60, 60.0)


def test_no_limits_is_no_limits() -> None:
    """0 everywhere lets everything in."""
    limiter = Limiter(TenantLimits(concurrent=0))
    for _ in range(1000):
        limiter.enter("a", 1 << 30, 0.0)


def test_the_table_of_tenants_is_bounded() -> None:
    """The longest unseen idle tenant is forgotten; where all are busy, a new one is told to come back."""
    limiter = Limiter(TenantLimits(), max_tenants=2)
    limiter.enter("a", 1, 0.0)
    limiter.enter("b", 1, 0.0)
    with pytest.raises(Overloaded):
        limiter.enter("c", 1, 0.0)
    limiter.leave("a", 1, 1)
    limiter.enter("c", 1, 0.0)
    limiter.leave("a", 1, 1)
    assert limiter.running("c") == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 30)), max_size=40), st.integers(1, 100))
def test_no_more_passes_than_a_minute_and_its_refill(steps: list[tuple[float, float]], per_minute: int) -> None:
    """What passed never exceeds a full bucket and what flowed in since; waiting as long as told suffices."""
    bucket, now, passed = Bucket.full(per_minute, 0.0), 0.0, 0.0
    for cost, pause in steps:
        now += pause
        wait = bucket.wait(cost, now)
        if wait == 0:
            bucket.take(cost)
            passed += min(cost, per_minute)
        else:
            now += wait + 1e-6
            assert bucket.wait(cost, now) == 0
        assert passed <= per_minute + now * per_minute / 60 + 1e-6


def test_a_clock_that_goes_back_gives_nothing() -> None:
    """Time that was counted is not counted again."""
    bucket = Bucket.full(60, 100.0)
    bucket.take(60)
    bucket.wait(60, 50.0)
    assert bucket.wait(60, 100.0) == pytest.approx(60.0)
