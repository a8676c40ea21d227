"""How much one tenant may ask: requests at once, requests and tokens a minute. Values in, RateLimited out; no clock."""

from collections import OrderedDict
from dataclasses import dataclass, field

from shared.errors import Overloaded, RateLimited

MAX_TENANTS = 4096


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What each tenant may use. 0 is no limit."""

    concurrent: int = 64
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    connections: int = 64
    """WebSockets at once, each of them an edge."""


@dataclass(slots=True)
class Bucket:
    """A token bucket that holds one minute's worth. `rate` is per second; `level` may fall below 0 by a late charge."""

    size: float
    level: float
    at: float

    @classmethod
    def full(cls, per_minute: float, now: float) -> "Bucket":
        return cls(per_minute, per_minute, now)

    def wait(self, cost: float, now: float) -> float:
        """Seconds until `cost` is there (0: it is). No cost counts for more than the bucket holds."""
        if not self.size:
            return 0.0
        self.level = min(self.size, self.level + max(0.0, now - self.at) * self.size / 60)
        self.at = max(self.at, now)
        return max(0.0, min(cost, self.size) - self.level) * 60 / self.size

    def take(self, cost: float) -> None:
        self.level = min(self.size, self.level - min(cost, self.size))


@dataclass(slots=True)
class _Tenant:
    requests: Bucket
    tokens: Bucket
    running: int = 0


@dataclass(slots=True)
class Limiter:
    """All tenants' use. The table is bounded: of the tenants with nothing running, the longest unseen is forgotten."""

    limits: TenantLimits
    max_tenants: int = MAX_TENANTS
    _tenants: "OrderedDict[str, _Tenant]" = field(default_factory=OrderedDict)

    def enter(self, tenant: str, tokens: int, now: float) -> None:
        """Count a request in, reserving `tokens`. Raises RateLimited saying when to come back, and counts nothing."""
        seen = self._of(tenant, now)
        if self.limits.concurrent and seen.running >= self.limits.concurrent:
            raise RateLimited(f"at most {self.limits.concurrent} requests at once", source="cloud", retry_after=1.0)
        for name, bucket, cost in (("requests", seen.requests, 1), ("tokens", seen.tokens, tokens)):
            wait = bucket.wait(cost, now)
            if wait > 0:
                raise RateLimited(
                    f"at most {bucket.size:g} {name} a minute", source="cloud", retry_after=max(0.1, wait)
                )
        seen.requests.take(1)
        seen.tokens.take(tokens)
        seen.running += 1

    def leave(self, tenant: str, reserved: int, used: int) -> None:
        """Count a request out and settle its reservation by what it used."""
        seen = self._tenants.get(tenant)
        if seen is not None:
            seen.running -= 1
            seen.tokens.take(used - reserved)

    def running(self, tenant: str) -> int:
        seen = self._tenants.get(tenant)
        return seen.running if seen else 0

    def _of(self, tenant: str, now: float) -> _Tenant:
        if tenant not in self._tenants:
            self._make_room()
            limits = self.limits
            self._tenants[tenant] = _Tenant(
                Bucket.full(limits.requests_per_minute, now), Bucket.full(limits.tokens_per_minute, now)
            )
        self._tenants.move_to_end(tenant)
        return self._tenants[tenant]

    def _make_room(self) -> None:
        if len(self._tenants) < self.max_tenants:
            return
        idle = next((name for name, seen in self._tenants.items() if not seen.running), None)
        if idle is None:
            raise Overloaded("too many tenants at once", source="cloud", retry_after=1.0)
        del self._tenants[idle]
