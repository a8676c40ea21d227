from dataclasses import replace

import pytest
from cache_parts import NOW, Clock, entry, query
from structlog.testing import capture_logs

from edge_agent.cache.base import Entry, Query
from edge_agent.cache.memory import MemoryLayer
from edge_agent.cache.store import CLOCK_SLACK_S, Store
from router.clauses import CacheRules


class Slow(MemoryLayer):
    """A second layer."""

    name = "slow"


class Similar(Slow):
    """One that takes any question for the one it knows."""

    exact = False

    async def get(self, query: Query) -> Entry | None:
        return entry("to something like it")


class Broken(Slow):
    async def get(self, query: Query) -> Entry | None:
        raise ValueError("a bug")

    async def put(self, query: Query, entry: Entry) -> None:
        raise ValueError("a bug")


class Choosy(Slow):
    def takes(self, query: Query) -> bool:
        return query.scope.label == "free"


async def test_what_a_slower_layer_had_is_then_in_the_faster_one() -> None:
    """Promotion upward: found in the second layer once, in the first from then on."""
    fast, slow = MemoryLayer(1 << 20), Slow(1 << 20)
    store = Store([fast, slow], clock=Clock(NOW + 5))
    await slow.put(query(), entry())

    first, second = await store.get(query()), await store.get(query())

    assert first is not None
    assert second is not None
    assert (first.layer, second.layer) == ("slow", "memory")
    assert first.age_s == second.age_s == 5
    assert [(layer["hits"], layer["misses"]) for layer in store.stats().values()] == [(1, 1), (1, 0)]


async def test_a_similar_answer_is_never_promoted() -> None:
    """Else it would come back as an exact one, whatever the policy says by then."""
    fast = MemoryLayer(1 << 20)
    store = Store([fast, Similar(1 << 20)], clock=Clock())

    assert (await store.get(query())) is not None

    assert fast.stats().entries == 0


@pytest.mark.parametrize(
    ("aged", "layer_s", "entry_s", "rules_s", "caller_s", "fresh"),
    [
        (9, 10, 10, 10, 10, True),
        (9, 8, 10, 10, 10, False),
        (9, 10, 8, 10, 10, False),
        (9, 10, 10, 8, 10, False),
        (9, 10, 10, 10, 8, False),
        (9, 10, 10, 10, None, True),
        (-CLOCK_SLACK_S - 1, 10, 10, 10, None, False),
        (-1, 10, 10, 10, None, True),
    ],
)
async def test_the_strictest_age_holds(
    aged: float, layer_s: float, entry_s: float, rules_s: float, caller_s: float | None, fresh: bool
) -> None:
    """The layer's, the answer's, the policy's and the caller's; and nothing from a future that no clock explains."""
    layer = MemoryLayer(1 << 20, ttl_s=layer_s)
    store = Store([layer], clock=Clock(NOW + aged))
    asked = replace(query(rules=CacheRules(ttl_s=rules_s)), max_age_s=caller_s)
    await layer.put(asked, entry(ttl_s=entry_s))

    assert (await store.get(asked) is not None) is fresh


async def test_a_broken_layer_is_one_that_has_nothing() -> None:
    """Never an error for who asks: the others are asked, and it is logged once."""
    fast = MemoryLayer(1 << 20)
    store = Store([Broken(0), fast], clock=Clock())

    with capture_logs() as logs:
        await store.put(query(), entry())
        found = await store.get(query())

    assert found is not None
    assert found.layer == "memory"
    assert [log["event"] for log in logs] == ["layer failed"]
    assert store.stats()["slow"]["errors"] == 3  # the put, the get, and the promotion into it


async def test_a_layer_is_not_asked_about_what_it_may_not_take() -> None:
    """Neither put into it nor looked for in it."""
    choosy = Choosy(1 << 20)
    store = Store([choosy], clock=Clock())

    await store.put(query(label="edge_only"), entry())

    assert await store.get(query(label="edge_only")) is None
    assert choosy.stats().entries == 0
    assert (store.stats()["slow"]["hits"], store.stats()["slow"]["misses"]) == (0, 0)


async def test_cleared_is_empty() -> None:
    """In all layers."""
    layers = [MemoryLayer(1 << 20), Slow(1 << 20)]
    store = Store(layers, clock=Clock())
    await store.put(query(), entry())

    await store.clear()

    assert await store.get(query()) is None
    assert [layer.stats().entries for layer in layers] == [0, 0]
