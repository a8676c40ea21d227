"""Checking drafted tokens: one step computes them all, and the right ones are kept.

A draft's rows are sampled as plain decoding would sample them, from logits and with the noise of their positions; the
draft is right as far as it says the same. A token x that was guessed without looking at the noise is then kept with its
probability p(x), and what stands in its place otherwise follows p without x: the rule of speculative decoding (see
arXiv 2211.17192) for a draft that is certain of itself. So a seed gives the same text with drafts and without.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from cloud_engine.engine.sampler import Row, Sampled, sample
from cloud_engine.engine.scheduler import Work
from cloud_engine.engine.sequence import Sequence
from shared.schemas import Sampling


@dataclass(frozen=True, slots=True)
class Guessed:
    """A sequence as it is if its `draft` is right."""

    sequence: Sequence
    draft: tuple[int, ...]

    @property
    def sampling(self) -> Sampling:
        return self.sequence.sampling

    @property
    def seed(self) -> int:
        return self.sequence.seed

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens, *self.draft]

    @property
    def num_tokens(self) -> int:
        return self.sequence.num_tokens + len(self.draft)

    @property
    def output(self) -> list[int]:
        return [*self.sequence.output, *self.draft]

    @property
    def num_output(self) -> int:
        return self.sequence.num_output + len(self.draft)


def sample_step(logits: Tensor, work: List[Work]) -> list[list[Sampled]]:
    """For each work that samples, what follows: the part of its draft that is right, and one more token."""
    items = [item for item in work if item.samples]
    sampled = iter(sample(logits, [row for item in items for row in rows(item)]))
    return [kept(item.draft, list(islice(sampled, 1 + len(item.draft)))) for item in items]


def rows(item: Work) -> list[Row]:
    """What each of its rows of logits is sampled for."""
    guessed = (Guessed(item.sequence, item.draft[:count]) for count in range(1, len(item.draft) + 1))
    return [item.sequence, *guessed]


def kept(draft: tuple[int, ...], sampled: list[Sampled]) -> list[Sampled]:
    """Up to the first token that the draft did not foresee."""
    right = 0
    while right < len(draft) and sampled[right].token == draft[right]:
        right += 1
    return sampled[: right + 1]
