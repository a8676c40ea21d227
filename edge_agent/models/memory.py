"""How much memory a model takes, and how much may be taken before the machine swaps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import psutil

from edge_agent.facts import Facts

OVERHEAD_BYTES: Final = 200 << 20
"""Of one loaded model beside its weights and its KV cache: the process, buffers, the vocabulary."""
USABLE: Final = 0.8
"""Of the machine's memory, where no limit is set: the rest belongs to everybody else."""
RESERVE: Final = 0.05
"""Of the machine's memory, left available at all times."""
MOST_SLOTS: Final = 16
FEWEST_SLOTS: Final = 8
SLOTS_SHARE: Final = 1 / 16
"""Of the machine's memory, for the context of a model's slots, where nobody has said how many it has."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes. The file's pages can be dropped and read again, so the system counts them as available though a model that
    has to read them again crawls; the rest cannot. Of that, `taken` is in use so far (None: all of it)."""

    file: int
    rest: int
    taken: int | None = None

    @property
    def total(self) -> int:
        return self.file + self.rest

    @property
    def in_use(self) -> int:
        return self.rest if self.taken is None else min(self.rest, self.taken)


NOTHING: Final = Need(0, 0)


def need(facts: Facts, size: int, *, slots: int, context: int, kept: int = 0) -> Need:
    """Of a model file of `size` bytes, with `slots` sequences of `context` tokens each, and `kept` bytes of computed
    prompts that outlive their slot."""
    return Need(size, slots * context * facts.kv_bytes + kept + OVERHEAD_BYTES)


def slots_for(facts: Facts, context: int, total: int) -> int:
    """How many requests a model answers at once in a machine with `total` bytes, where nobody has said. Those that come
    while all are taken wait for their first token; what a slot has not used yet takes no memory (`backends.pages`)."""
    fit = int(total * SLOTS_SHARE) // max(1, context * facts.kv_bytes)
    return min(MOST_SLOTS, max(FEWEST_SLOTS, fit))


@dataclass(frozen=True, slots=True)
class Memory:
    """`total` is the machine's, `available` what the system could give out now; `limit` is for all models together."""

    total: int
    available: Callable[[], int]
    limit: int | None = None

    @property
    def most(self) -> int:
        return int(self.total * USABLE) if self.limit is None else self.limit

    def room(self, staying: Sequence[Need], leaving: Sequence[Need] = ()) -> int:
        """Bytes that one more model may take, once those that leave have left."""
        free = self.available() - int(self.total * RESERVE)
        free += sum(model.in_use for model in leaving) - sum(model.total - model.in_use for model in staying)
        return min(free, self.most - sum(model.total for model in staying))


def machine_memory(limit: int | None) -> Memory:
    """This machine's."""
    return Memory(psutil.virtual_memory().total, lambda: psutil.virtual_memory().available, limit)
