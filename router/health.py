"""The health of the way to the cloud, as a value: a circuit breaker with one probe at a time, and running estimates.

    closed     everything is admitted; opens on failures in a row, or on too many in the window
    open       nothing is admitted until `retry_at`
    half open  from `retry_at` on: exactly one request is admitted as a probe, and `retry_at` moves to its timeout.
               Its success closes the breaker, its failure opens it for twice as long, its silence admits another.

`now` is any clock that never runs backwards, in seconds.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal, Self

from router.clauses import Breaker
from shared.errors import BadRequest, Cancelled, CausewayError, RequestConflict

FIRST_TOKEN_GAIN: Final = 1 / 5

State = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one offloaded request went. `ok` None: it says nothing of the cloud's health (cancelled before an answer)."""

    ok: bool | None
    first_token_s: float | None = None

    @classmethod
    def of_error(cls, error: BaseException) -> Self:
        """An error about the request shows that the cloud is there; any other typed one is its failure.

        A cancellation, or a fault of ours, says nothing.
        """
        if isinstance(error, BadRequest | RequestConflict):
            return cls(ok=True)
        if not isinstance(error, CausewayError) or isinstance(error, Cancelled):
            return cls(ok=None)
        return cls(ok=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudHealth:
    recent: tuple[bool, ...] = ()
    """Outcomes while closed, oldest first; at most the breaker's window."""
    retry_at: float | None = None
    """None while closed; otherwise when the next probe may go."""
    cool_down_s: float = 0.0
    """Of the current opening."""
    probing: bool = False
    first_token_s: float | None = None

    def state(self, now: float) -> State:
        if self.retry_at is None:
            return "closed"
        return "open" if now < self.retry_at else "half_open"

    def admits(self, now: float) -> bool:
        """Whether `admit` would; changes nothing."""
        return self.state(now) != "open"

    def retry_after_s(self, now: float) -> float | None:
        return None if self.retry_at is None else max(0.0, self.retry_at - now)

    @property
    def failure_ratio(self) -> float | None:
        """Of the latest requests; None before the first, and after an opening."""
        return self.recent.count(False) / len(self.recent) if self.recent else None

    def admit(self, now: float, breaker: Breaker) -> tuple["CloudHealth", bool]:
        """Ask right before sending. While half open, whoever asks first is the probe."""
        match self.state(now):
            case "closed":
                return self, True
            case "open":
                return self, False
            case "half_open":
                return replace(self, retry_at=now + breaker.probe_timeout_s, probing=True), True

    def after(self, outcome: Outcome, now: float, breaker: Breaker) -> "CloudHealth":
        """Report at the first token, or at the error before it.

        While open, only a probe is waited for: requests sent before the opening neither close nor prolong it. Which of
        those still under way is the probe is not asked: whoever reports during a probe has just met the cloud.
        """
        known = self._measured(outcome)
        if outcome.ok is None or (self.retry_at is not None and not self.probing):
            return known
        if self.probing and outcome.ok:
            return known._closed()
        if self.probing:
            return known._opened(now, min(2 * self.cool_down_s, breaker.max_cool_down_s))
        known = replace(known, recent=(*self.recent, outcome.ok)[-breaker.window :])
        return known._opened(now, breaker.cool_down_s) if known._failing(breaker) else known

    def after_connect(self, now: float) -> "CloudHealth":
        """A new connection is no proof, but reason enough to probe at once."""
        return self if self.retry_at is None else replace(self, retry_at=min(now, self.retry_at), probing=False)

    def _failing(self, breaker: Breaker) -> bool:
        in_a_row = self.recent[-breaker.consecutive_failures :]
        if len(in_a_row) == breaker.consecutive_failures and not any(in_a_row):
            return True
        return len(self.recent) == breaker.window and self.recent.count(False) >= breaker.failure_ratio * breaker.window

    def _opened(self, now: float, cool_down_s: float) -> "CloudHealth":
        return replace(self, recent=(), retry_at=now + cool_down_s, cool_down_s=cool_down_s, probing=False)

    def _closed(self) -> "CloudHealth":
        return replace(self, recent=(), retry_at=None, cool_down_s=0.0, probing=False)

    def _measured(self, outcome: Outcome) -> "CloudHealth":
        if outcome.first_token_s is None:
            return self
        return replace(self, first_token_s=_smoothed(self.first_token_s, outcome.first_token_s, FIRST_TOKEN_GAIN))


def _smoothed(old: float | None, sample: float, gain: float) -> float:
    return sample if old is None else old + gain * (sample - old)
