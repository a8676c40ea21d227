"""The next token of one request, from its row of logits; what each field means is said in shared.schemas.Sampling.

Order: penalties, biases, what may not be drawn at all, temperature, top-k, top-p, min-p, draw. A draw depends on the
seed and the token's position alone, never on what was drawn before or on the batch around it.
"""

import math
from collections.abc import Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import BadRequest, UpstreamFailed
from shared.guides import Guide
from shared.noise import uniform
from shared.schemas import Sampling

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]

BLOCK = 256
ROUNDING = 1e-6
"""More than the error of a weight: they are of 32 bits, and their sums of 64."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, and if asked for its log probability and the likeliest tokens (id, log probability), best first. `last`:
    by its grammar the answer is complete."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    last: bool = False


class Sampler:
    """Of one request. `prompt` and what was sampled so far feed the penalties; `ends` are the tokens that end the
    model's answers; `guide` is this answer's own. Raises BadRequest if a token id is none of the `vocabulary`."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Ids,
        vocabulary: int,
        seed: int,
        *,
        ends: Set[int] = frozenset(),
        guide: Guide | None = None,
    ) -> None:
        _check_ids(sampling, vocabulary)
        self._sampling = sampling
        self._guide = guide
        self._seed = seed if sampling.seed is None else sampling.seed
        self._position = len(prompt)
        self._first_end = len(prompt) + sampling.min_tokens
        self._barred = np.array(sorted({*ends, *sampling.stop_token_ids}), np.int64)
        self._biased = np.array([*sampling.logit_bias], np.int64)
        self._biases = np.array([*sampling.logit_bias.values()], np.float32)
        self._counts: NDArray[np.int64] | None = None
        self._seen: NDArray[np.bool_] | None = None
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = np.zeros(vocabulary, np.int64)
        if sampling.repetition_penalty != 1:
            self._seen = np.zeros(vocabulary, np.bool_)
            self._seen[prompt] = True

    def pick(self, row: Floats) -> Sampled:
        """The next token from logits [vocabulary], which are changed in place. Raises UpstreamFailed if none that may
        be drawn has a finite one, BadRequest if the grammar has become too complex."""
        self._penalise(row)
        self._restrict(row)
        best = int(row.argmax())
        if not np.isfinite(row[best]):
            raise UpstreamFailed("the model computed no finite number", source="edge")
        token = best if self._sampling.temperature == 0 else self._draw(row, row[best])
        last = self.learn(token)
        if self._sampling.logprobs is None:
            return Sampled(token, last=last)
        return _with_logprobs(row, token, best, self._sampling.logprobs, last=last)

    def learn(self, token: int) -> bool:
        """The token is the answer's next; says whether by its grammar the answer is complete."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        self._position += 1
        return self._guide is not None and self._guide.take(token)

    def _restrict(self, row: Floats) -> None:
        """Biases, and minus infinity for what may not be drawn. A grammar knows itself where an answer may end."""
        if len(self._biased):
            row[self._biased] += self._biases
        if self._guide is None:
            if self._position < self._first_end:
                row[self._barred] = -math.inf
            return
        mask = np.frombuffer(self._guide.mask(), np.uint8)
        if self._guide.failed:
            raise BadRequest("the grammar has too many states to follow this answer", param="grammar", source="edge")
        allowed = np.unpackbits(mask, bitorder="little")[: len(row)].view(np.bool_)
        row[len(allowed) :] = -math.inf
        row[: len(allowed)][~allowed] = -math.inf

    def _penalise(self, row: Floats) -> None:
        """Repetition counts prompt and output and scales; presence and frequency count output and subtract."""
        if self._seen is not None:
            seen, penalty = np.flatnonzero(self._seen), self._sampling.repetition_penalty
            values = row[seen]
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts is not None:
            said = np.flatnonzero(self._counts)
            row[said] -= self._sampling.presence_penalty + self._sampling.frequency_penalty * self._counts[said]

    def _draw(self, row: Floats, best: np.float32) -> int:
        """The inverse of the cumulative distribution, in order of token id, at this position's number."""
        sampling, ids = self._sampling, None
        if 0 < sampling.top_k < len(row):
            ids = _top(row, sampling.top_k)
            row = row[ids]
        with np.errstate(over="ignore"):
            # Relative to the best: no temperature overflows, and the likeliest token weighs 1.
            weights: Floats = np.exp((row - best) / np.float32(sampling.temperature))
        if sampling.top_p < 1:
            kept = _nucleus(weights, sampling.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if sampling.min_p:
            kept = np.flatnonzero(weights >= sampling.min_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        index = _at(weights, uniform(self._seed, self._position))
        return index if ids is None else int(ids[index])


def _top(row: Floats, count: int) -> NDArray[np.intp]:
    """Ids of the `count` highest logits, in order of id; of equal ones the lowest ids."""
    highest = np.maximum.reduceat(row, np.arange(0, len(row), BLOCK))
    able = np.arange(len(row))
    if count <= len(highest):  # as many logits are at least as high as the lowest of so many blocks' highest
        able = np.flatnonzero(row >= np.partition(highest, -count)[-count])
    values = row[able]
    least = np.partition(values, -count)[-count]
    above, equal = able[values > least], able[values == least]
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def _nucleus(weights: Floats, top_p: float) -> NDArray[np.intp]:
    """The fewest, likeliest tokens whose probability reaches `top_p`, in order."""
    total = float(weights.sum(dtype=np.float64))
    # All tokens below this floor together weigh less than 1 - top_p, so none is in the nucleus: no need to sort them.
    able = np.flatnonzero(weights >= (1 - top_p) * total / len(weights) * (1 - ROUNDING))
    able = able if len(able) else np.array([weights.argmax()])
    order = able[np.argsort(-weights[able], kind="stable")]
    reached = int(weights[order].cumsum(dtype=np.float64).searchsorted(top_p * total, side="left")) + 1
    return np.sort(order[:reached])


def _at(weights: Floats, share: float) -> int:
    """The token at this share of all weights, of which one is over 0: the first whose running sum is beyond it. Sums of
    blocks find its block, so that not every sum is written down."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64).cumsum()
    point = share * sums[-1]
    block = min(int(sums.searchsorted(point, side="right")), len(sums) - 1)
    within = weights[block * BLOCK : (block + 1) * BLOCK]
    before = sums[block - 1] if block else 0.0
    index = int((before + within.cumsum(dtype=np.float64)).searchsorted(point, side="right"))
    # Right of the point is the first token whose own weight is not zero, but where the two sums are rounded otherwise.
    return block * BLOCK + (index if index < len(within) else int(np.flatnonzero(within)[-1]))


def _check_ids(sampling: Sampling, vocabulary: int) -> None:
    for param, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        if any(token >= vocabulary for token in ids):
            raise BadRequest(f"a token id is outside 0 to {vocabulary - 1}", param=param, source="edge")


def _with_logprobs(row: Floats, token: int, best: int, count: int, *, last: bool) -> Sampled:
    shifted = row.astype(np.float64) - float(row[best])
    norm = float(np.log(np.exp(shifted).sum()))
    likeliest = _top(row, count) if count else np.empty(0, np.intp)
    likeliest = likeliest[np.argsort(-shifted[likeliest], kind="stable")]
    top = tuple((int(index), float(shifted[index]) - norm) for index in likeliest)
    return Sampled(token, float(shifted[token]) - norm, top, last)
