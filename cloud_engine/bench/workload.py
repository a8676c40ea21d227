"""What is asked of an engine that is measured: random prompts, made anew from a seed, of fixed or of mixed lengths."""

import math
import random
from dataclasses import dataclass
from typing import Literal

Lengths = Literal["fixed", "mixed"]
LEAST = 4
"""Tokens of the shortest prompt and output of a mix."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt, and the exact number of tokens to generate."""

    prompt: list[int]
    output: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Log-normal lengths: `sigma` is that of the logarithm; longer than `most` means is cut to it."""

    sigma: float
    most: float

    def draw(self, mean: int, rng: random.Random) -> int:
        length = rng.lognormvariate(math.log(mean) - self.sigma**2 / 2, self.sigma)
        return max(LEAST, round(min(length, self.longest(mean))))

    def longest(self, mean: int) -> int:
        return max(LEAST, math.floor(self.most * mean))


PROMPTS = Spread(sigma=1.18, most=6.0)
OUTPUTS = Spread(sigma=0.93, most=3.0)
"""With means of 161 and 338 tokens, those of ShareGPT in Kwon et al. 2023 (section 6.1), half of the prompts are under
80 tokens and half of the outputs under 220; nothing is longer than 966 and 1,014."""
SHAREGPT = (161, 338)


def jobs(lengths: Lengths, n: int, mean_in: int, mean_out: int, *, tokens: range, seed: int) -> list[Job]:
    """`n` requests whose prompts are drawn from `tokens`: each of exactly these lengths, or a mix with these means."""
    rng = random.Random(seed)  # noqa: S311 - not a secret
    made = []
    for _ in range(n):
        sizes = (mean_in, mean_out)
        if lengths == "mixed":
            sizes = PROMPTS.draw(mean_in, rng), OUTPUTS.draw(mean_out, rng)
        made.append(Job([rng.choice(tokens) for _ in range(sizes[0])], sizes[1]))
    return made


def longest(lengths: Lengths, mean_in: int, mean_out: int) -> int:
    """Tokens that prompt and output of one job may have together."""
    return mean_in + mean_out if lengths == "fixed" else PROMPTS.longest(mean_in) + OUTPUTS.longest(mean_out)
