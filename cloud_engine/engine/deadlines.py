"""Which requests cannot be answered in time, so that nothing is computed for them. Time comes in as a number."""

import heapq

from cloud_engine.engine.sequence import Sequence, State

MARGIN = 2.0
"""By how much the engine may turn out to be faster than measured: only what is plainly too late is given up."""


class Pace:
    """How fast full steps are. Others say little: a step of a few decodes takes much time a token."""

    def __init__(self, full: int) -> None:
        """`full`: steps with so many tokens at least are measured."""
        self._full = full
        self._seconds_a_token = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if tokens < self._full:
            return
        measured = max(0.0, seconds / tokens)
        known = self._seconds_a_token
        self._seconds_a_token = measured if known == 0 else 0.8 * known + 0.2 * measured

    def least_seconds(self, tokens: int) -> float:
        """What so many tokens take at least; 0 while nothing is measured."""
        return tokens * self._seconds_a_token / MARGIN


class Deadlines:
    """When to look at which sequence again. O(log n) a sequence; those that ended are passed over and cost no memory
    for long."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._sweep_at = 64

    def __len__(self) -> int:
        return len(self._heap)

    def watch(self, sequence: Sequence, at: float) -> None:
        heapq.heappush(self._heap, (at, sequence.arrival, sequence))
        if len(self._heap) > self._sweep_at:
            self._heap = [entry for entry in self._heap if entry[2].state is not State.FINISHED]
            heapq.heapify(self._heap)
            self._sweep_at = 64 + 2 * len(self._heap)

    def due(self, now: float) -> list[Sequence]:
        """Those to look at now: they are watched no more."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            _, _, sequence = heapq.heappop(self._heap)
            if sequence.state is not State.FINISHED:
                found.append(sequence)
        return found
