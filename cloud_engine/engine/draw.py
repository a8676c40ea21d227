"""How the next token of one sequence is drawn, as plain data: what sampling is told beside the logits."""

from dataclasses import dataclass

from shared.schemas import Sampling

Odds = tuple[tuple[int, float], ...]
"""A distribution: tokens and their probabilities, all others having none."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A token at `position` of a sequence, if its `draft` is right. `tokens` are those before the draft, of which the
    first `num_prompt` are the prompt; only penalties count them, so the last may be missing where there are none.
    `guess` is a token that somebody drew from these odds: it is kept as often as can be without changing what the
    token's distribution is."""

    sampling: Sampling
    seed: int
    position: int
    tokens: list[int]
    num_prompt: int
    draft: tuple[int, ...] = ()
    guess: tuple[int, Odds] | None = None
    barred: tuple[int, ...] = ()
    """Tokens that may not be drawn."""
    mask: bytes | None = None
    """Those that may, if not all may: bit i % 8 of byte i // 8."""

    @property
    def seen(self) -> list[int]:
        return [*self.tokens, *self.draft]

    @property
    def output(self) -> list[int]:
        return [*self.tokens[self.num_prompt :], *self.draft]


def has_penalty(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
