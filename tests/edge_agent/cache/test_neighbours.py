import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.cache.neighbours import FIRST_ROWS, Neighbours

ANGLES = st.floats(0, 3.14)


def at(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("ab"), ANGLES, st.booleans()), max_size=80),
    ANGLES,
    st.sampled_from([-0.91, -0.37, 0.0123, 0.83]),
)
def test_finds_what_a_plain_search_finds(
    steps: list[tuple[int, str, float, bool]], asked: float, threshold: float
) -> None:
    """After any adding, replacing and dropping: the same rows, the nearest first, of the group alone."""
    table: Neighbours[float] = Neighbours(1000)
    plain: dict[bytes, tuple[str, float]] = {}
    for number, group, angle, keep in steps:
        name = str(number).encode()
        if keep:
            table.add(name, at(angle), angle, group=group.encode(), owner=b"o")
            plain[name] = (group, angle)
        else:
            table.drop(name)
            plain.pop(name, None)
    assert len(table) == len(plain)
    for group in "ab":
        found = table.nearest(group.encode(), at(asked), threshold, 5)
        cosines = [float(at(angle) @ at(asked)) for _, angle in found]
        near = sorted((float(at(angle) @ at(asked)) for of, angle in plain.values() if of == group), reverse=True)
        expected = [cosine for cosine in near if cosine >= threshold][:5]
        np.testing.assert_allclose(cosines, expected, atol=1e-6)
        assert table.has(group.encode()) == any(of == group for of, _ in plain.values())


def test_whoever_has_most_makes_room_with_what_was_used_least() -> None:
    """One owner's flood pushes out its own rows; what was of use stays longer."""
    table: Neighbours[int] = Neighbours(FIRST_ROWS * 2)
    table.add(b"alice", at(0), 0, group=b"g", owner=b"alice")
    for number in range(FIRST_ROWS * 2 - 1):
        table.add(b"%d" % number, at(1), number, group=b"g", owner=b"bob")
    table.used(b"0")
    table.add(b"new", at(1), -1, group=b"g", owner=b"bob")
    names = {name for name, _ in table.nearest(b"g", at(1), -1, 1000)}
    assert len(table) == FIRST_ROWS * 2
    assert {b"alice", b"0", b"new"} <= names
    assert b"1" not in names
    assert table.evictions == 1
    assert table.size <= FIRST_ROWS * 2 * 2 * 4


def test_vectors_of_another_model_do_not_mix() -> None:
    """A new width: what was there compares with nothing, and makes room."""
    table: Neighbours[int] = Neighbours(10)
    table.add(b"old", at(0), 0, group=b"g", owner=b"o")
    assert table.nearest(b"g", np.ones(3, np.float32), -1, 5) == []
    table.add(b"new", np.array([1, 0, 0], np.float32), 1, group=b"g", owner=b"o")
    assert table.nearest(b"g", np.array([1, 0, 0], np.float32), 0.5, 5) == [(b"new", 1)]
    assert len(table) == 1
