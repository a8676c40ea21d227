"""What a model takes of the machine, and what is left."""

import pytest

from edge_agent.facts import Facts
from edge_agent.models.memory import Memory, Need, need, slots_for

GIB = 1 << 30


@pytest.mark.parametrize(
    ("machine", "token_bytes", "slots"),
    [(24 * GIB, 23_040, 16), (8 * GIB, 23_040, 11), (2 * GIB, 23_040, 8), (16 * GIB, 131_072, 8), (GIB, 0, 16)],
)
def test_a_large_machine_has_more_slots(machine: int, token_bytes: int, slots: int) -> None:
    """As many as have their context in a sixteenth of it, from 8 to 16."""
    assert slots_for(Facts(architecture="llama", parameters=1, kv_bytes=token_bytes), 2048, machine) == slots


def test_what_is_promised_and_not_yet_taken_is_nobody_elses() -> None:
    """Whatever a model has taken so far, the next one finds the same room; one that leaves gives back what it has."""
    whole = need(Facts(architecture="llama", parameters=1, kv_bytes=1000), 50_000_000, slots=8, context=1000)
    rooms, left = set(), []
    for taken in (whole.rest // 4, whole.rest // 2, whole.rest, None):
        now = Need(whole.file, whole.rest, taken)
        memory = Memory(10**12, lambda now=now: 10**11 - now.in_use)
        rooms.add(memory.room([now]))
        left.append(memory.room([], [now]))

    assert rooms == {10**11 - 10**12 // 20 - whole.total}
    assert set(left) == {10**11 - 10**12 // 20}
