import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.engine import fairness
from cloud_engine.engine.fairness import FairQueue
from cloud_engine.engine.sequence import Sequence
from shared.schemas import Sampling


def sequence(number: int, tenant: str, prompt: int = 1) -> Sequence:
    made = Sequence(
        id=str(number),
        tokens=[1] * prompt,
        sampling=Sampling(),
        max_tokens=1,
        seed=0,
        stop_ids=frozenset(),
        root=b"",
        tenant=tenant,
    )
    made.arrival = number
    return made


class SlowQueue:
    """The paper's algorithm as it is written, with a search instead of an order that is kept."""

    def __init__(self) -> None:
        self.queue: list[Sequence] = []
        self.returning: list[Sequence] = []
        self.counters: dict[str, int] = {}
        self.last = ""

    def push(self, new: Sequence) -> None:
        if not any(one.tenant == new.tenant for one in self.queue):
            others = [self.counters[one.tenant] for one in self.queue]
            floor = min(others) if others else self.counters.get(self.last, 0)
            self.counters[new.tenant] = max(self.counters.get(new.tenant, 0), floor)
        self.queue.append(new)

    def first(self) -> Sequence | None:
        if self.returning:
            return min(self.returning, key=lambda one: one.arrival)
        return min(self.queue, key=lambda one: (self.counters[one.tenant], one.arrival), default=None)

    def remove(self, gone: Sequence) -> None:
        if gone in self.returning:
            self.returning.remove(gone)
            return
        self.queue.remove(gone)
        if not any(one.tenant == gone.tenant for one in self.queue):
            self.last = gone.tenant

    def charge(self, tenant: str, tokens: int) -> None:
        self.counters[tenant] = self.counters.get(tenant, 0) + tokens


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), tenants=st.integers(1, 6))
def test_it_is_the_papers_algorithm(seed: int, tenants: int) -> None:
    """Under random arrivals, admissions, aborts, preemptions and charges it names the same first as a plain search."""
    rng, fast, slow = random.Random(seed), FairQueue(), SlowQueue()
    waiting: list[Sequence] = []
    admitted: list[Sequence] = []
    for number in range(200):
        draw = rng.random()
        if draw < 0.4:
            new = sequence(number, str(rng.randrange(tenants)), rng.randrange(1, 50))
            fast.push(new)
            slow.push(new)
            waiting.append(new)
        elif draw < 0.6 and waiting:
            first = slow.first()
            assert first is not None
            fast.remove(first)
            slow.remove(first)
            waiting.remove(first)
            admitted.append(first)
            fast.charge(first.tenant, first.num_prompt)
            slow.charge(first.tenant, first.num_prompt)
        elif draw < 0.7 and waiting:
            gone = rng.choice(waiting)
            fast.remove(gone)
            slow.remove(gone)
            waiting.remove(gone)
        elif draw < 0.75 and admitted:
            back = admitted.pop(rng.randrange(len(admitted)))
            fast.put_back(back)
            slow.returning.append(back)
            waiting.append(back)
        elif admitted:
            tenant = rng.choice(admitted).tenant
            fast.charge(tenant, 2)
            slow.charge(tenant, 2)
        assert fast.first() is slow.first()
        assert len(fast) == len(waiting)
        assert set(fast) == set(waiting)


def serve(queue: FairQueue, times: int) -> Counter[str]:
    """Admit the first `times` over: tokens by tenant."""
    served: Counter[str] = Counter()
    for _ in range(times):
        first = queue.first()
        if first is None:
            break
        queue.remove(first)
        queue.charge(first.tenant, first.num_prompt)
        served[first.tenant] += first.num_prompt
    return served


def test_waiting_tenants_get_equal_tokens_not_equal_requests() -> None:
    """Long prompts of one tenant against short ones of another: equal within one long prompt."""
    queue = FairQueue()
    for number in range(1000):
        queue.push(sequence(2 * number, "long", 100))
        queue.push(sequence(2 * number + 1, "short", 7))
    served = serve(queue, 500)
    assert abs(served["long"] - served["short"]) <= 100
    assert min(served.values()) > 1000


def test_who_was_away_has_no_credit() -> None:
    """A tenant that had nothing waiting while another was served 10,000 tokens does not get 10,000 ahead of it."""
    queue = FairQueue()
    for number in range(3000):
        queue.push(sequence(number, "steady", 10))
    serve(queue, 1000)
    for number in range(3000, 4000):
        queue.push(sequence(number, "new", 10))
    served = serve(queue, 100)
    assert abs(served["new"] - served["steady"]) <= 10


def test_a_newcomer_starts_where_the_last_to_leave_stands() -> None:
    """With nobody waiting, what is served to those that run counts still: the next to come has no credit over them."""
    queue = FairQueue()
    queue.push(sequence(1, "a", 10))
    serve(queue, 1)
    queue.charge("a", 500)
    for number, tenant in enumerate(["b", "a"] * 50, start=2):
        queue.push(sequence(number, tenant, 10))
    served = serve(queue, 40)
    assert abs(served["a"] - served["b"]) <= 10


def test_one_tenants_flood_delays_another_by_one_request() -> None:
    """However many requests one tenant has waiting, a newcomer is next or the one after."""
    queue = FairQueue()
    for number in range(1000):
        queue.push(sequence(number, "flood", 50))
    serve(queue, 10)
    queue.push(sequence(1000, "other", 50))
    assert serve(queue, 2)["other"] == 50


def test_counters_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tenants that are gone are forgotten, those with requests waiting never."""
    monkeypatch.setattr(fairness, "MAX_COUNTERS", 10)
    queue = FairQueue()
    queue.push(sequence(0, "waits"))
    for number in range(1, 100):
        passing = sequence(number, f"t{number}")
        queue.push(passing)
        queue.charge(passing.tenant, 5)
        queue.remove(passing)
    assert len(queue._served) <= 12
    assert queue.first() is next(iter(queue))
