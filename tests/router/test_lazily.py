"""router.lazily: worked out once, and only if it is asked for."""

from dataclasses import dataclass, field

from router.lazily import lazily


@dataclass(frozen=True)
class Sum:
    of: tuple[int, ...]
    worked: list[int] = field(default_factory=list)

    @lazily
    def value(self) -> int:
        """All together."""
        self.worked.append(1)
        return sum(self.of)


def test_what_is_asked_for_twice_is_worked_out_once() -> None:
    """Each object has its own; a frozen one, too; nothing is worked out before."""
    one, other = Sum((1, 2)), Sum((3, 4))
    assert one.worked == []
    assert (one.value, one.value, other.value) == (3, 3, 7)
    assert (one.worked, other.worked) == ([1], [1])
    assert Sum.value.__doc__ == "All together."
