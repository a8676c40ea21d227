"""A bounded table of vectors in groups: the nearest of a group by one product. Room is made by dropping what has been
of no use for longest, of the owner who has the most."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

FIRST_ROWS = 64
"""Room to begin with; doubled when it is full, up to the table's bound."""

Vector = npt.NDArray[np.float32]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _Row(Generic[Item]):
    name: bytes
    group: bytes
    owner: bytes
    item: Item


class Neighbours(Generic[Item]):
    """Vectors are of length 1, so that their product is their cosine. A `name` is in the table once."""

    def __init__(self, rows: int) -> None:
        self._limit = rows
        self._vectors = np.empty((0, 0), np.float32)
        self._free: list[int] = []
        self._rows: dict[int, _Row[Item]] = {}
        self._slots: dict[bytes, int] = {}
        self._groups: dict[bytes, set[int]] = {}
        self._owners: dict[bytes, OrderedDict[int, None]] = {}
        """Each one's least recently useful first."""
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def size(self) -> int:
        """Bytes of the vectors."""
        return self._vectors.nbytes

    def has(self, group: bytes) -> bool:
        return group in self._groups

    def add(self, name: bytes, vector: Vector, item: Item, *, group: bytes, owner: bytes) -> None:
        self.drop(name)
        if self._rows and len(vector) != self._vectors.shape[1]:  # another model's: nothing here compares with it
            self.clear()
        if len(self._rows) >= self._limit:
            fullest = max(self._owners, key=lambda one: len(self._owners[one]))
            self.drop(self._rows[next(iter(self._owners[fullest]))].name)
            self.evictions += 1
        slot = self._slot(len(vector))
        self._vectors[slot] = vector
        self._rows[slot], self._slots[name] = _Row(name, group, owner, item), slot
        self._groups.setdefault(group, set()).add(slot)
        self._owners.setdefault(owner, OrderedDict())[slot] = None

    def nearest(self, group: bytes, vector: Vector, threshold: float, count: int) -> list[tuple[bytes, Item]]:
        """At most `count` of the group, the nearest first, none below the threshold; each with its name."""
        if group not in self._groups or len(vector) != self._vectors.shape[1]:
            return []
        slots = np.fromiter(self._groups[group], np.int64)
        cosines = self._vectors[slots] @ vector
        near = [at for at in np.argsort(-cosines)[:count] if cosines[at] >= threshold]
        return [(row.name, row.item) for at in near if (row := self._rows[int(slots[at])])]

    def used(self, name: bytes) -> None:
        slot = self._slots[name]
        self._owners[self._rows[slot].owner].move_to_end(slot)

    def drop(self, name: bytes) -> None:
        """Nothing happens if it is not there."""
        slot = self._slots.pop(name, None)
        if slot is None:
            return
        row = self._rows.pop(slot)
        self._groups[row.group].remove(slot)
        del self._owners[row.owner][slot]
        if not self._groups[row.group]:
            del self._groups[row.group]
        if not self._owners[row.owner]:
            del self._owners[row.owner]
        self._free.append(slot)

    def clear(self) -> None:
        for name in list(self._slots):
            self.drop(name)
        self._vectors, self._free = np.empty((0, 0), np.float32), []

    def _slot(self, width: int) -> int:
        if not self._free:
            there = len(self._vectors)
            grown = np.zeros((min(self._limit, max(FIRST_ROWS, 2 * there)), width), np.float32)
            grown[:there] = self._vectors if there else 0
            self._vectors, self._free = grown, list(range(there, len(grown)))
        return self._free.pop()
