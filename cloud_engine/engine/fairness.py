"""Whose turn it is among tenants: the virtual token counter of "Fairness in Serving Large Language Models" (VTC,
arXiv 2401.00588).

Each tenant has a counter of the tokens it was served, and the waiting tenant with the lowest one is next. Who comes
back after having had nothing waiting starts at the lowest counter of those that wait: time that was not used is no
credit. So tenants that wait side by side get equal service, whatever each of them asks for at once, up to about one
request's worth. Within a tenant the order is that of arrival.
"""

from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Iterator

from cloud_engine.engine.sequence import Sequence

MAX_COUNTERS = 4096
"""Tenants whose counters are kept while nothing of theirs waits."""

_Rank = tuple[int, int, str]
"""Tokens served, arrival of the first that waits, tenant."""


class FairQueue:
    """Waiting sequences of equal priority. Each operation costs O(log tenants), `first` that for each tenant charged
    since the last one."""

    def __init__(self) -> None:
        self._waiting: dict[str, OrderedDict[Sequence, None]] = {}
        self._returning: list[Sequence] = []
        self._served: OrderedDict[str, int] = OrderedDict()
        self._ranking: list[_Rank] = []
        self._ranks: dict[str, _Rank] = {}
        self._stale: set[str] = set()
        self._last = ""
        """The tenant that was the last to have nothing waiting any more."""
        self._backlog: Counter[str] = Counter()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returning
        for queue in self._waiting.values():
            yield from queue

    @property
    def returning(self) -> bool:
        """Whether a preempted sequence waits."""
        return bool(self._returning)

    def served(self, tenant: str) -> int:
        """The tenant's counter: comparable with that of others only while both wait."""
        return self._served.get(tenant, 0)

    def backlog(self, tenant: str) -> int:
        """Tokens of the tenant's prompts that wait, all to be admitted before a new one of it."""
        return self._backlog[tenant]

    def push(self, sequence: Sequence) -> None:
        tenant = sequence.tenant
        if tenant not in self._waiting:
            self._served[tenant] = max(self.served(tenant), self._floor())
            self._served.move_to_end(tenant)
            self._waiting[tenant] = OrderedDict()
            self._stale.add(tenant)
            self._forget()
        self._waiting[tenant][sequence] = None
        self._backlog[tenant] += sequence.num_prompt
        self._size += 1

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence waits again, in front of those that were never admitted: its tenant has paid for it."""
        insort(self._returning, sequence, key=_arrival)
        self._size += 1

    def first(self) -> Sequence | None:
        if self._returning:
            return self._returning[0]
        self._rerank()
        return next(iter(self._waiting[self._ranking[0][2]])) if self._ranking else None

    def remove(self, sequence: Sequence) -> None:
        """Raises KeyError for one that does not wait here."""
        self._size -= 1
        at = bisect_left(self._returning, sequence.arrival, key=_arrival)
        if self._returning[at : at + 1] == [sequence]:
            del self._returning[at]
            return
        tenant = sequence.tenant
        del self._waiting[tenant][sequence]
        self._backlog[tenant] -= sequence.num_prompt
        self._stale.add(tenant)
        if not self._waiting[tenant]:
            del self._waiting[tenant], self._backlog[tenant]
            self._last = tenant

    def charge(self, tenant: str, tokens: int) -> None:
        """Count `tokens` as served to a tenant, whether or not more of it waits."""
        self._served[tenant] = self.served(tenant) + tokens
        self._stale.add(tenant)

    def _floor(self) -> int:
        self._rerank()
        return self._ranking[0][0] if self._ranking else self.served(self._last)

    def _rerank(self) -> None:
        for tenant in self._stale:
            if (old := self._ranks.pop(tenant, None)) is not None:
                del self._ranking[bisect_left(self._ranking, old)]
            if queue := self._waiting.get(tenant):
                self._ranks[tenant] = rank = (self._served[tenant], next(iter(queue)).arrival, tenant)
                insort(self._ranking, rank)
        self._stale.clear()

    def _forget(self) -> None:
        """A tenant that is forgotten loses what it owed, so the one that was away longest goes first."""
        while len(self._served) > MAX_COUNTERS + len(self._waiting):
            del self._served[next(tenant for tenant in self._served if tenant not in self._waiting)]


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
