"""What sequences were made of when they had to leave their slots, in memory: the least recently used go first.

A slot keeps what it computed until another request needs it; only then is its state copied out, and copied back when a
prompt begins like it. Copying costs about a thousandth of computing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_agent.backends.sampling import Ids

MIN_TOKENS = 64
"""Shorter ones are computed again: that takes about one step."""
MAX_KEPT = 256

State = bytes | memoryview
"""What was computed of a sequence, as llama.cpp wrote it."""


@dataclass(eq=False, frozen=True, slots=True)
class Kept:
    """A sequence's tokens and its state. `private`: must not be written to disk."""

    tokens: Ids
    state: State
    private: bool

    @property
    def size(self) -> int:
        return len(self.state) + self.tokens.nbytes


class Prefixes:
    """At most `budget` bytes. Belongs to one thread."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: list[Kept] = []
        self.size = 0

    @property
    def kept(self) -> list[Kept]:
        """The most recently used first."""
        return self._kept[::-1]

    def longest(self, prompt: Ids) -> tuple[Kept | None, int]:
        """The one that shares most with the beginning of a prompt, and how many tokens: never the prompt's last one."""
        lengths = [common(kept.tokens, prompt[:-1]) for kept in self._kept]
        best = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        return (None, 0) if best is None else (self._kept[best], lengths[best])

    def used(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self._kept.append(kept)

    def add(self, tokens: Ids, size: int, state: Callable[[], State], *, private: bool) -> None:
        """Copy a state of `size` bytes out, unless it is too short, too long, or here already."""
        if len(tokens) < MIN_TOKENS or size + tokens.nbytes > self._budget:
            return
        for kept in self._kept:
            if common(kept.tokens, tokens) == len(tokens) and private >= kept.private:
                self.used(kept)
                return
        self.put(Kept(tokens.copy(), state(), private))

    def put(self, kept: Kept) -> None:
        """In place of those that it begins with."""
        for other in [
            other
            for other in self._kept
            if common(other.tokens, kept.tokens) == len(other.tokens) and other.private >= kept.private
        ]:
            self._drop(other)
        while self._kept and (self.size + kept.size > self._budget or len(self._kept) >= MAX_KEPT):
            self._drop(self._kept[0])
        if kept.size <= self._budget:
            self._kept.append(kept)
            self.size += kept.size

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self.size -= kept.size


def common(one: Ids, other: Ids) -> int:
    """How many tokens both begin with."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size
