"""What the cloud has cost today, by tenant and by key: so that a decision can be held against a budget.

A request under way counts for what it may cost, so that a burst cannot spend the same money twice; once it has ended,
for what it did cost. Each counts for the day on which it was decided, which ends at midnight of the device's clock.
"""

import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import structlog

from router.money import Spent
from router.records import Recorded, costs

Day = tuple[int, int, int]


class Spending:
    """Told when a request is decided and when it has ended. All on the event loop, and at once."""

    def __init__(
        self,
        known: Mapping[str, float] | None = None,
        *,
        known_by_key: Mapping[str, float] | None = None,
        now: Callable[[], float] = time.time,
        local_time: Callable[[float], time.struct_time] = time.localtime,
    ) -> None:
        """`known` is what was spent today before, by tenant; `known_by_key` the same by key."""
        self._now, self._local_time = now, local_time
        self._day = self._day_of(now())
        self._by_tenant = dict(known or {})
        self._by_key = dict(known_by_key or {})
        self._aside: dict[str, float] = {}

    @classmethod
    def remembered(cls, journal: Path, *, now: Callable[[], float] = time.time) -> Self:
        """Goes on from what the journal has of today."""
        year, month, day, *_ = time.localtime(now())
        midnight = time.mktime((year, month, day, 0, 0, 0, 0, 0, -1))
        known, by_key = dict[str, float](), dict[str, float]()
        try:
            known, by_key = costs(journal, since=midnight), costs(journal, since=midnight, by="key")
        except FileNotFoundError:
            pass
        except (OSError, sqlite3.Error) as error:
            log = structlog.get_logger("causeway.spending")
            log.warning("what was spent today is not known, counted from now on", error=str(error))
        return cls(known, known_by_key=by_key, now=now)

    def spent(self, tenant: str, key: str = "") -> Spent:
        self._turn()
        return Spent(
            day=sum(self._by_tenant.values()),
            tenant=self._by_tenant.get(tenant, 0.0),
            key=self._by_key.get(key, 0.0),
        )

    def begun(self, request_id: str, record: Recorded) -> None:
        """What it may cost is set aside, once."""
        if record.may_cost and request_id not in self._aside:
            self._aside[request_id] = record.may_cost
            self._add(record, record.may_cost)

    def ended(self, request_id: str, record: Recorded) -> None:
        """What it did cost takes the place of what was set aside."""
        self._add(record, (record.outcome.cost or 0.0) - self._aside.pop(request_id, 0.0))

    def stats(self) -> dict[str, Any]:
        """In the currency of the prices; what is under way is part of both."""
        self._turn()
        return {
            "today": sum(self._by_tenant.values()),
            "tenants": dict(self._by_tenant),
            "set_aside": sum(self._aside.values()),
        }

    def _add(self, record: Recorded, amount: float) -> None:
        self._turn()
        if amount and self._day_of(record.at) == self._day:
            for sums, whose in ((self._by_tenant, record.request.tenant), (self._by_key, record.request.key)):
                sums[whose] = max(0.0, sums.get(whose, 0.0) + amount)

    def _turn(self) -> None:
        """Forget yesterday."""
        today = self._day_of(self._now())
        if today != self._day:
            self._day = today
            self._by_tenant.clear()
            self._by_key.clear()

    def _day_of(self, at: float) -> Day:
        year, month, day, *_ = self._local_time(at)
        return year, month, day
