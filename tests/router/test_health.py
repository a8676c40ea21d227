import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.clauses import Breaker
from router.health import CloudHealth, Outcome
from shared.errors import BadRequest, Cancelled, ContextTooLong, Overloaded, RequestConflict, Unauthorized, Unreachable

BREAKER = Breaker(
    consecutive_failures=3, window=6, failure_ratio=0.5, cool_down_s=2, max_cool_down_s=10, probe_timeout_s=30
)
GOOD, BAD, MUTE = Outcome(ok=True), Outcome(ok=False), Outcome(ok=None)


def after(*outcomes: Outcome, health: CloudHealth | None = None, now: float = 0.0) -> CloudHealth:
    health = health or CloudHealth()
    for outcome in outcomes:
        health = health.after(outcome, now, BREAKER)
    return health


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([], "closed"),
        ([BAD, BAD], "closed"),
        ([BAD, BAD, BAD], "open"),
        ([BAD, BAD, GOOD, BAD, BAD], "closed"),
        ([BAD, BAD, MUTE, BAD], "open"),
        ([BAD, GOOD, BAD, GOOD, BAD], "closed"),
        ([BAD, GOOD, BAD, GOOD, BAD, GOOD], "open"),
        ([GOOD, BAD, GOOD, BAD, GOOD, GOOD], "closed"),
        ([MUTE] * 20, "closed"),
    ],
)
def test_what_opens_it(outcomes, state):
    """Three failures in a row, or half of a full window; a cancellation counts for nothing."""
    assert after(*outcomes).state(0.0) == state


def test_a_full_course():
    """Open, one probe, fails, open twice as long, one probe, succeeds, closed with a clean record."""
    health = after(BAD, BAD, BAD, now=100.0)
    assert (health.state(101.9), health.retry_after_s(101.0)) == ("open", 1.0)
    assert health.admit(101.9, BREAKER) == (health, False)
    assert health.state(102.0) == "half_open"

    health, probe = health.admit(102.0, BREAKER)
    assert probe
    assert health.admit(103.0, BREAKER) == (health, False)
    health = after(BAD, health=health, now=104.0)
    assert not health.admits(107.9)
    assert health.admits(108.0)

    health, probe = health.admit(108.0, BREAKER)
    assert probe
    health = after(GOOD, health=health, now=108.5)
    assert health == CloudHealth()


def test_the_cool_down_is_bounded():
    """However long the cloud is away, it is looked for every max_cool_down_s."""
    health, now = after(BAD, BAD, BAD), 0.0
    waits = []
    for _ in range(5):
        waits.append(health.retry_after_s(now))
        now += waits[-1]
        health, _ = health.admit(now, BREAKER)
        health = after(BAD, health=health, now=now)
    assert waits == [2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_probe_that_is_never_heard_of_is_given_up():
    """A probe cancelled by its client cannot keep the cloud shut out."""
    health, _ = after(BAD, BAD, BAD).admit(2.0, BREAKER)
    health = after(MUTE, health=health, now=3.0)
    assert not health.admits(31.9)
    assert health.admits(32.0)


def test_requests_sent_before_the_opening_change_nothing():
    """What was under way when it opened neither closes it early nor keeps it open longer."""
    health = after(BAD, BAD, BAD)
    assert after(GOOD, BAD, GOOD, health=health, now=1.0) == health


def test_a_new_connection_is_probed_at_once():
    """Coming back does not wait for the cool-down, but one request goes first."""
    health = after(BAD, BAD, BAD).after_connect(1.0)
    assert health.state(1.0) == "half_open"
    health, _ = health.admit(1.0, BREAKER)
    assert not health.admits(1.0)
    assert CloudHealth().after_connect(5.0) == CloudHealth()


def test_the_first_tokens_time_follows_smoothly():
    """The first sample is taken as it is; later ones move the estimate by their gain."""
    health = after(Outcome(ok=True, first_token_s=1.0), Outcome(ok=True, first_token_s=2.0))
    assert health.first_token_s == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("error", "ok"),
    [
        (Unreachable("x"), False),
        (Overloaded("x"), False),
        (Unauthorized("x"), False),
        (BadRequest("x"), True),
        (ContextTooLong("x"), True),
        (RequestConflict("x"), True),
        (Cancelled("x"), None),
        (KeyboardInterrupt(), None),
        (ValueError(), None),
    ],
)
def test_outcome_of_error(error, ok):
    """The cloud's failures count; a refusal of a bad request proves it alive; the rest says nothing."""
    assert Outcome.of_error(error) == Outcome(ok=ok)


class BreakerMachine(RuleBasedStateMachine):
    """The value against a model in prose: a mode, a record of outcomes, and two times."""

    def __init__(self) -> None:
        super().__init__()
        self.health = CloudHealth()
        self.now = 0.0
        self.mode = "closed"
        self.record: list[bool] = []
        self.wait = 0.0
        self.until = 0.0

    def open_for(self, wait: float) -> None:
        self.mode, self.record, self.wait, self.until = "open", [], wait, self.now + wait

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 7.0, 31.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def request(self):
        ready = self.mode == "closed" or self.now >= self.until
        assert self.health.admits(self.now) is ready
        self.health, admitted = self.health.admit(self.now, BREAKER)
        assert admitted is ready
        if admitted and self.mode != "closed":
            self.mode, self.until = "probing", self.now + BREAKER.probe_timeout_s
            assert not self.health.admits(self.now)

    @rule(ok=st.booleans())
    def report(self, ok):
        self.health = self.health.after(Outcome(ok=ok), self.now, BREAKER)
        if self.mode == "probing":
            if ok:
                self.mode, self.record = "closed", []
            else:
                self.open_for(min(self.wait * 2, BREAKER.max_cool_down_s))
        elif self.mode == "closed":
            self.record.append(ok)
            latest = self.record[-BREAKER.window :]
            in_a_row = self.record[-BREAKER.consecutive_failures :] == [False] * BREAKER.consecutive_failures
            if in_a_row or (len(latest) == BREAKER.window and sum(latest) <= BREAKER.window / 2):
                self.open_for(BREAKER.cool_down_s)

    @rule()
    def cancelled(self):
        before = self.health
        self.health = self.health.after(MUTE, self.now, BREAKER)
        assert self.health == before

    @precondition(lambda self: self.mode != "closed")
    @rule()
    def reconnected(self):
        self.health = self.health.after_connect(self.now)
        self.mode, self.until = "open", min(self.now, self.until)

    @invariant()
    def states_agree(self):
        shut = self.mode != "closed"
        expected = "closed" if not shut else "open" if self.now < self.until else "half_open"
        assert self.health.state(self.now) == expected
        assert len(self.health.recent) <= BREAKER.window


BreakerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestBreaker = BreakerMachine.TestCase
