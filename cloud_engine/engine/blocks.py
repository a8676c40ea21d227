"""The pool of KV blocks: who holds which, and which computed prefixes can be shared.

Block 0 is the null block: never handed out, so that padding may point at it. A block with references is in use; without
any it is on the free list, where it keeps its hash, and so its content, until it is handed out again. The list is in
order of eviction: blocks nobody can look up first, then the least recently used. A sequence gives its blocks back
last block first, so that of a cached prefix the tail goes before the head. What is evicted may go on in host memory,
see `host_cache`. No block is evicted in the very step that publishes it, since its sequence holds it: there is always
something to save.
"""

import hashlib
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from cloud_engine.engine.host_cache import HostCache

NULL_BLOCK = 0


def chain_root(*extra: str) -> bytes:
    """Hash that a prefix chain starts from. Everything that must not share (tenant, weights, dtype) goes in."""
    parts = [text.encode("utf-8", "surrogatepass") for text in extra]
    return hashlib.sha256(b"".join(len(part).to_bytes(8) + part for part in parts)).digest()


def chain_hash(parent: bytes, tokens: list[int]) -> bytes:
    """Hash of one full block under its whole prefix; sha256, so that no tenant can construct a collision."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class BlockPool:
    """Reference-counted blocks 1..num_blocks-1, over `host_blocks` more in host memory. Every operation is O(1) per
    block."""

    def __init__(self, num_blocks: int, host_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.published: dict[bytes, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self.host = HostCache(host_blocks)

    @property
    def num_free(self) -> int:
        return len(self.free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self.free)

    def lookup(self, hashes: Sequence[bytes]) -> tuple[list[int], list[bytes]]:
        """The blocks of this chain's longest published prefix, and the hashes of those after it that only the host has.
        Takes no reference."""
        here = itertools.takewhile(lambda key: key in self.published, hashes)
        found = [self.published[key] for key in here]
        rest = itertools.takewhile(lambda key: key not in self.published, hashes[len(found) :])
        return found, self.host.lookup(rest)

    def fits(self, shared: list[int], count: int, *, spare: int = 0) -> bool:
        """Whether `take` would give a table."""
        revived = sum(block in self.free for block in shared)
        return len(self.free) - revived - count >= spare

    def take(self, shared: list[int], count: int, *, spare: int = 0, stored: Sequence[bytes] = ()) -> list[int] | None:
        """A table of the `shared` blocks followed by `count` new ones, or None (and nothing changed) if that would
        leave fewer than `spare` free. The shared ones leave the free list first, so no new block evicts them. The first
        of the new ones are filled with what `lookup` said to be `stored`, and can be shared at once."""
        if not self.fits(shared, count, spare=spare):
            return None
        for block in shared:
            self.free.pop(block, None)
            self.references[block] += 1
        borrowed = self.host.borrow(stored)
        new = [self._evict() for _ in range(count)]
        self.host.load(borrowed, new[: len(borrowed)])
        for block, key in zip(new, stored, strict=False):
            self.publish(block, key)
        return shared + new

    def release(self, table: list[int]) -> None:
        """Drop one reference to each block of a table."""
        for block in reversed(table):
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free[block] = None
                if self.hashes[block] is None:
                    self.free.move_to_end(block, last=False)

    def publish(self, block: int, key: bytes) -> None:
        """Let others find a full block by its hash. The first block of a hash stays the one that is found."""
        if key not in self.published and self.hashes[block] is None:
            self.published[key] = block
            self.hashes[block] = key

    def _evict(self) -> int:
        block, _ = self.free.popitem(last=False)
        self.references[block] = 1
        key = self.hashes[block]
        if key is not None:
            self.host.save(key, block)
            del self.published[key]
            self.hashes[block] = None
        return block
