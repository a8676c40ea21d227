from collections.abc import Coroutine
from typing import Any

from cache_parts import entry, query
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_agent.cache.base import MAX_ENTRY_BYTES, encoded
from edge_agent.cache.memory import ROW_BYTES, MemoryLayer

ROW = len(encoded(entry("x" * 100))) + ROW_BYTES


async def test_gives_what_was_put_and_nothing_else() -> None:
    """The same key, the same answer; another question or another tenant: nothing."""
    layer = MemoryLayer(1 << 20)
    await layer.put(query("a"), entry("to a"))

    assert await layer.get(query("a")) == entry("to a")
    assert await layer.get(query("b")) is None
    assert await layer.get(query("a", tenant="ann")) is None
    assert await layer.get(query("a", label="edge_only")) is None


async def test_drops_the_least_recently_used_first() -> None:
    """Room for three: the fourth pushes out what nobody asked for since."""
    layer = MemoryLayer(3 * ROW)
    for name in "abc":
        await layer.put(query(name), entry(name * 100))
    await layer.get(query("a"))

    await layer.put(query("d"), entry("d" * 100))

    assert [name for name in "abcd" if await layer.get(query(name))] == ["a", "c", "d"]
    assert layer.stats().evictions == 1


async def test_a_flood_pushes_out_its_own_answers_first() -> None:
    """S-48: one tenant's thousand answers leave another's two where they are."""
    layer = MemoryLayer(10 * ROW)
    for name in "ab":
        await layer.put(query(name, tenant="ann"), entry(name * 100))

    for at in range(1000):
        await layer.put(query(f"{at}", tenant="bob"), entry("x" * 100))

    assert await layer.get(query("a", tenant="ann")) is not None
    assert await layer.get(query("b", tenant="ann")) is not None
    assert layer.stats().evictions >= 990


async def test_what_is_too_large_is_not_kept_and_pushes_nothing_out() -> None:
    """Neither beyond the limit of an answer nor beyond that of the layer."""
    small, large = MemoryLayer(2 * ROW), MemoryLayer(1 << 30)
    await small.put(query("a"), entry("x" * 100))

    await small.put(query("b"), entry("x" * 10 * ROW))
    await large.put(query("b"), entry("x" * MAX_ENTRY_BYTES))

    assert (small.stats().entries, small.stats().evictions, large.stats().entries) == (1, 0, 0)


class AsADictionary(RuleBasedStateMachine):
    """Beside a dictionary that forgets nothing: never another answer than the last one put, never over the limit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = MemoryLayer(6 * ROW)
        self.put: dict[tuple[str, str], str] = {}

    @rule(who=st.sampled_from("AB"), what=st.sampled_from("abcdefgh"), size=st.integers(0, 400))
    def remember(self, who: str, what: str, size: int) -> None:
        self.put[who, what] = what * size
        run(self.layer.put(query(what, tenant=who), entry(what * size)))

    @rule(who=st.sampled_from("AB"), what=st.sampled_from("abcdefgh"))
    def recall(self, who: str, what: str) -> None:
        found = run(self.layer.get(query(what, tenant=who)))
        assert found is None or found.deltas[0].text == self.put[who, what]

    @rule()
    def clear(self) -> None:
        run(self.layer.clear())
        assert self.layer.stats().entries == 0

    @invariant()
    def bounded(self) -> None:
        rows = [raw for rows in self.layer._rows.values() for raw in rows.values()]
        assert self.layer.stats().size == sum(len(raw) + ROW_BYTES for raw in rows) <= 6 * ROW


def run(step: Coroutine[Any, Any, Any]) -> Any:
    """A step that waits for nothing needs no loop."""
    try:
        step.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the memory layer waited")


TestAsADictionary = AsADictionary.TestCase
TestAsADictionary.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
