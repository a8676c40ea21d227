"""A bound on how many may wait that no tenant can use up alone."""

from collections import Counter

from shared.errors import Overloaded


class Places:
    """Who waits, by tenant. While fewer than `limit` wait, anybody may. Then each of n tenants, the one that asks
    counted too, may still have `limit / n` places: so with n tenants at most about `limit * (1 + ln n)` wait, and those
    who took more before are refused until they are down to their part."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: Counter[str] = Counter()
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def of(self, tenant: str) -> int:
        return self._held[tenant]

    def check(self, tenant: str) -> None:
        """Raises Overloaded if one more of this tenant may not wait."""
        if self._total < self._limit:
            return
        tenants = len(self._held) + (tenant not in self._held)
        if self.of(tenant) >= self._limit // tenants:
            raise Overloaded(f"{self._total} requests are waiting already, {self.of(tenant)} of yours", retry_after=1.0)

    def enter(self, tenant: str) -> None:
        self._held[tenant] += 1
        self._total += 1

    def leave(self, tenant: str) -> None:
        self._held[tenant] -= 1
        self._total -= 1
        if not self._held[tenant]:
            del self._held[tenant]
