"""Which evicted prefixes are kept in host memory, and where: the second level below `blocks.BlockPool`.

The device's pool says which block is lost next; if others could find it by its hash, its content is copied to a slot of
host memory first, and from there back into a block when a sequence begins with the same tokens. A copy stays in its
slot after it was read, so that evicting the block again costs nothing. The least recently evicted goes first.

This is bookkeeping only. What is to be copied is said in a list of `Swap`, which travels with the step's chunks.
"""

from collections import OrderedDict
from collections.abc import Iterable

from cloud_engine.engine.chunk import Swap


class HostCache:
    """`num_slots` of host memory, a block each. Every operation is O(1) per block."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slots: OrderedDict[bytes, int] = OrderedDict()
        """Slot by hash, in order of eviction."""
        self.free = list(range(num_slots))
        self.swaps: list[Swap] = []
        """Not yet told to the device, in the order they must be done."""
        self.saved = self.loaded = 0

    def lookup(self, hashes: Iterable[bytes]) -> list[bytes]:
        """Those of the longest prefix of this chain that is here."""
        found: list[bytes] = []
        for key in hashes:
            if key not in self.slots:
                break
            found.append(key)
        return found

    def save(self, key: bytes, block: int) -> None:
        """The block is about to be given to somebody else. Keep its content if there is room."""
        slot = self.slots.pop(key, None)
        if slot is None:
            if not self.free and not self.slots:
                return
            slot = self.free.pop() if self.free else self.slots.popitem(last=False)[1]
            self.swaps.append(Swap(block, slot, loads=False))
            self.saved += 1
        self.slots[key] = slot

    def borrow(self, keys: Iterable[bytes]) -> list[tuple[bytes, int]]:
        """Take these out of the order of eviction, that nothing saved meanwhile overwrites them, until `load`."""
        return [(key, self.slots.pop(key)) for key in keys]

    def load(self, borrowed: list[tuple[bytes, int]], blocks: Iterable[int]) -> None:
        """Fill blocks with what was borrowed, in this order. Of a prefix the tail will be evicted before the head."""
        self.swaps += [Swap(block, slot, loads=True) for (_, slot), block in zip(borrowed, blocks, strict=True)]
        self.slots.update(reversed(borrowed))
        self.loaded += len(borrowed)

    def drain(self) -> tuple[Swap, ...]:
        """What the device must copy before it computes the next step."""
        swaps, self.swaps = tuple(self.swaps), []
        return swaps
