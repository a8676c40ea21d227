"""Which guesses are worth a step's rows: a single sequence drafts far ahead, many at once only what is nearly certain.

A row more costs little while a step is short: reading the weights is what takes the time. The probability of a guess is
the rate at which the sequence's guesses were right; see `shared.lookup`.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as List

from cloud_engine.engine.sequence import Sequence
from cloud_engine.engine.work import Work
from shared.lookup import Lookup, worth


class Drafter:
    """Gives decoding sequences their drafts before a step, and learns how they fared."""

    def __init__(self, free_rows: int) -> None:
        self.free_rows = free_rows

    def hopes(self, running: List[Sequence]) -> bool:
        """Whether tokens under way are worth waiting for: what can be guessed before them, can be after them too."""
        pending = [sequence for sequence in running if sequence.num_pending and not sequence.drafted]
        return any(draft for _, draft in self._drafts(pending, running))

    def propose(self, running: List[Sequence]) -> None:
        """Drafts for those that decode, whose tokens are all known, and for whom nobody else drafted."""
        decoding = [item for item in running if item.num_output and item.num_due == 1 and not item.num_pending]
        ready = [item for item in decoding if not item.draft and not item.drafted]
        for sequence, draft in self._drafts(ready, running):
            sequence.draft = draft

    def _drafts(self, ready: List[Sequence], running: List[Sequence]) -> Iterator[tuple[Sequence, tuple[int, ...]]]:
        rows, expected = sum(sequence.num_due for sequence in running), float(len(running))
        for sequence in ready:
            lookup = sequence.lookup = sequence.lookup or Lookup()
            guess = lookup.guess(sequence.tokens)
            count, expected = worth(lookup.rate, len(guess), free_rows=self.free_rows, rows=rows, expected=expected)
            rows += count
            if guess and not count:
                lookup.rest()
            yield sequence, guess[:count]

    @staticmethod
    def learn(work: Iterable[Work], taken: Iterable[int]) -> None:
        """`taken` says how many tokens came of each work."""
        for item, count in zip(work, taken, strict=True):
            if item.draft and item.sequence.lookup is not None and count:
                item.sequence.lookup.learn(len(item.draft), count - 1)
