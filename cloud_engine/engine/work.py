"""What a step computes of one sequence, as the scheduler sees it, and as it is told to the device."""

from collections.abc import Sequence as List
from dataclasses import dataclass

from cloud_engine.engine.chunk import Chunk, Swap
from cloud_engine.engine.draw import Draw, Odds
from cloud_engine.engine.sequence import Sequence

PLACEHOLDER = 0
"""Stands for a token that only the device knows yet."""


@dataclass(frozen=True, slots=True)
class Work:
    """Compute `count` tokens of a sequence, from position `start` on; if that reaches the end, sample the next one, and
    one after each token of `draft`: the same step computes those too, as if they were known to follow. For `previous`
    and `swaps` see `Chunk`."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    draft: tuple[int, ...] = ()
    odds: tuple[Odds, ...] = ()
    previous: int | None = None
    swaps: tuple[Swap, ...] = ()

    @property
    def waits(self) -> bool:
        """No step can be scheduled before this one is settled."""
        return bool(self.draft) or self.sequence.waits

    @property
    def rows(self) -> int:
        """What it takes of the step's budget."""
        return self.count + len(self.draft)

    def chunk(self) -> Chunk:
        """What the device needs to know of it."""
        tokens = self.sequence.tokens[self.start : self.start + self.count]
        if self.previous is not None:
            tokens = [PLACEHOLDER]
        table = list(self.sequence.block_table)
        sampled = len(self.draft) + self.samples
        return Chunk([*tokens, *self.draft], self.start, table, sampled, self.previous, self.swaps)

    def draws(self) -> list[Draw]:
        """How the tokens after these are drawn, one for each row of logits that is wanted."""
        sequence, end = self.sequence, self.start + self.count
        guesses = [*zip(self.draft, self.odds, strict=False)]  # odds for all of a draft, or for none
        mask = sequence.guide.mask() if sequence.guide is not None and self.samples else None
        return [
            Draw(
                sequence.sampling,
                sequence.seed,
                end + right,
                sequence.tokens,
                sequence.num_prompt,
                self.draft[:right],
                guesses[right] if right < len(guesses) else None,
                sequence.barred(end + right - sequence.num_prompt),
                mask,
            )
            for right in range(self.samples + len(self.draft))
        ]


def number_samples(work: List[Work]) -> None:
    """Tell each sequence where the device will find its first sample of this step."""
    place = 0
    for item in work:
        if item.samples:
            item.sequence.sample = place
            place += 1 + len(item.draft)
