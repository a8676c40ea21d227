"""Who waits, and who is next: interactive before batch, tenants in turn, the preempted before the new.

Batch work ages: once `patience` tokens were computed for interactive requests while a batch one waited, the first batch
one is next, however many interactive ones there are. So the batch request at place k waits for about k * patience
tokens of others, and interactive ones meet at most one batch prompt in each `patience` tokens.
"""

from collections.abc import Iterator

from cloud_engine.engine.fairness import FairQueue
from cloud_engine.engine.places import Places
from cloud_engine.engine.sequence import Sequence

OUTPUT_WEIGHT = 2
"""Tokens of a prompt that one of output counts for: a step computes many of the former at once. As in the VTC paper."""


def rank(sequence: Sequence) -> tuple[bool, int]:
    """Sorts the running: the highest gives its blocks back first. Batch work that was made to wait long enough, or gave
    up its place once, counts like interactive work of its age. So the oldest always gets to its end."""
    return (sequence.priority == "batch" and not sequence.aged, sequence.arrival)


class WaitingQueue:
    """The waiting sequences of all priorities and tenants, and what their tenants were served."""

    def __init__(self, limit: int, patience: int) -> None:
        self._patience = patience
        self._lanes = {"interactive": FairQueue(), "batch": FairQueue()}
        self.places = Places(limit)
        self._passed_over = 0
        """Tokens computed for interactive sequences since batch work waits or was last admitted."""

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Sequence]:
        for lane in self._lanes.values():
            yield from lane

    @property
    def num_batch(self) -> int:
        return len(self._lanes["batch"])

    def backlog(self, sequence: Sequence) -> int:
        """Tokens of the prompts that a new sequence waits for in any case."""
        return self._lanes[sequence.priority].backlog(sequence.tenant)

    def push(self, sequence: Sequence) -> None:
        """A new sequence waits, for which `places` has room."""
        self.places.enter(sequence.tenant)
        self._lanes[sequence.priority].push(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence waits again. It does so once: for the next time it has aged."""
        sequence.aged = True
        self.places.enter(sequence.tenant)
        self._lanes[sequence.priority].put_back(sequence)

    def first(self) -> Sequence | None:
        """The sequence to admit next. Nobody behind it is admitted before it, also when it does not fit yet."""
        interactive, batch = self._lanes["interactive"], self._lanes["batch"]
        if self._batch_is_due and not interactive.returning:
            return batch.first()
        return interactive.first() or batch.first()

    def take(self, sequence: Sequence) -> None:
        """The sequence is admitted."""
        if sequence.priority == "batch":
            sequence.aged = sequence.aged or self._batch_is_due
            self._passed_over = 0
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._lanes[sequence.priority].remove(sequence)
        self.places.leave(sequence.tenant)

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Count `tokens` (of a prompt; one of output is `OUTPUT_WEIGHT`) as served to the sequence's tenant."""
        self._lanes[sequence.priority].charge(sequence.tenant, tokens)
        if not self._lanes["batch"]:
            self._passed_over = 0
        elif sequence.priority == "interactive":
            self._passed_over += tokens

    @property
    def _batch_is_due(self) -> bool:
        return len(self._lanes["batch"]) > 0 and self._passed_over >= self._patience
