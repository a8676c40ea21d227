"""A policy on trial: it decides a share of the conversations, and is withdrawn if that goes worse than was agreed.

A value; whoever counts keeps the latest one.
"""

from dataclasses import dataclass, field, replace
from typing import Final

from router.policy import Policy
from shared.errors import BY_CODE
from shared.telemetry import RequestFinished

FAILED_SHARE: Final = 0.05
LEAST: Final = 20
WINDOW: Final = 200
"""The latest requests that are looked at."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is agreed. Shares from 0 to 1; nothing is judged before `least` requests have ended."""

    failed_share: float = FAILED_SHARE
    first_token_s: float | None = None
    """What the median first token may take; None: whatever it takes."""
    least: int = LEAST


@dataclass(frozen=True, slots=True)
class Canary:
    """`version` decides `percent` of the conversations: those with the lowest buckets."""

    version: int
    policy: Policy
    percent: float
    limits: Limits = Limits()
    failed: tuple[bool, ...] = field(default=(), repr=False)
    first_tokens_s: tuple[float, ...] = field(default=(), repr=False)

    def takes(self, bucket: float) -> bool:
        return bucket < self.percent

    def after(self, event: RequestFinished) -> "Canary":
        """With one more request counted; one that its client cancelled or got wrong says nothing."""
        if event.outcome == "cancelled":
            return self
        status = BY_CODE[event.error_code].status if event.error_code in BY_CODE else 500
        if event.outcome == "error" and status < 500 and status not in (403, 408, 429):
            return self
        first = () if event.first_token_s is None else (event.first_token_s,)
        return replace(
            self,
            failed=(*self.failed, event.outcome == "error")[-WINDOW:],
            first_tokens_s=(*self.first_tokens_s, *first)[-WINDOW:],
        )

    def breach(self) -> str | None:
        """Why it is to be withdrawn, in a few words; None as long as it keeps what was agreed."""
        ended, limits = len(self.failed), self.limits
        if ended < limits.least:
            return None
        failed = sum(self.failed)
        if failed / ended > limits.failed_share:
            return f"{failed} of {ended} requests failed, more than {limits.failed_share:.1%}"
        if limits.first_token_s is not None and self.first_tokens_s:
            middle = sorted(self.first_tokens_s)[len(self.first_tokens_s) // 2]
            if middle > limits.first_token_s:
                return f"half of the first tokens took over {middle:.2f} s, more than {limits.first_token_s:g} s"
        return None
