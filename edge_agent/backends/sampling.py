"""The next token of one request, from its row of logits; what each field means is said in shared.schemas.Sampling.

A draw depends on the seed and the token's position alone, never on what was drawn before or on the batch around it.
"""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.schemas import Sampling

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]
Wide = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, and if asked for its log probability and the likeliest tokens (id, log probability), best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Of one request. `prompt` and what was sampled so far feed the penalties."""

    def __init__(self, sampling: Sampling, prompt: Ids, vocabulary: int, seed: int) -> None:
        self._sampling = sampling
        self._seed = seed if sampling.seed is None else sampling.seed
        self._position = len(prompt)
        self._scales = sampling.repetition_penalty != 1
        self._counts: NDArray[np.int64] | None = None
        self._seen: NDArray[np.bool_] | None = None
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = np.zeros(vocabulary, np.int64)
        if self._scales:
            self._seen = np.zeros(vocabulary, np.bool_)
            self._seen[prompt] = True

    def pick(self, row: Floats) -> Sampled | None:
        """The next token from logits [vocabulary], which are changed in place; None if they are not finite."""
        self._penalise(row)
        best = int(row.argmax())
        if not np.isfinite(row[best]):
            return None
        token = best if self._sampling.temperature == 0 else self._draw(row, float(row[best]))
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        self._position += 1
        if self._sampling.logprobs is None:
            return Sampled(token)
        return _with_logprobs(row, token, best, self._sampling.logprobs)

    def _penalise(self, row: Floats) -> None:
        """Repetition counts prompt and output and scales; presence and frequency count output and subtract."""
        if self._seen is not None:
            seen, penalty = np.flatnonzero(self._seen), self._sampling.repetition_penalty
            values = row[seen]
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts is not None:
            said = np.flatnonzero(self._counts)
            row[said] -= self._sampling.presence_penalty + self._sampling.frequency_penalty * self._counts[said]

    def _draw(self, row: Floats, best: float) -> int:
        """The inverse of the cumulative distribution, in float64, in order of token id, at this position's number."""
        sampling = self._sampling
        ids = np.arange(len(row)) if not 0 < sampling.top_k < len(row) else _top(row, sampling.top_k)
        # Relative to the best: no temperature overflows, and the likeliest token weighs 1.
        weights = np.exp((row[ids].astype(np.float64) - best) / sampling.temperature)
        if sampling.top_p < 1:
            ids, weights = _nucleus(ids, weights, sampling.top_p)
        if sampling.min_p:
            kept = weights >= sampling.min_p
            ids, weights = ids[kept], weights[kept]
        cumulative = weights.cumsum()
        point = uniform(self._seed, self._position) * cumulative[-1]
        # Right of the point is the first token whose own weight is not zero.
        index = min(int(cumulative.searchsorted(point, side="right")), len(ids) - 1)
        return int(ids[index])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 48 random bits, fixed by its arguments."""
    digest = hashlib.blake2b(struct.pack("<qQ", seed, position), digest_size=6).digest()
    return int.from_bytes(digest, "little") / (1 << 48)


def _top(row: Floats, count: int) -> NDArray[np.intp]:
    """Ids of the `count` highest logits, in order of id."""
    ids: NDArray[np.intp] = np.sort(row.argpartition(-count)[-count:])
    return ids


def _nucleus(ids: NDArray[np.intp], weights: Wide, top_p: float) -> tuple[NDArray[np.intp], Wide]:
    """The fewest, likeliest tokens whose probability reaches `top_p`, in order of id."""
    goal = top_p * weights.sum()
    # All tokens below this floor together weigh less than 1 - top_p, so none is in the nucleus: no need to sort them.
    able = np.flatnonzero(weights >= (weights.sum() - goal) / len(weights))
    able = able if len(able) else np.array([weights.argmax()])
    order = able[np.argsort(-weights[able], kind="stable")]
    reached = int(weights[order].cumsum().searchsorted(goal, side="left")) + 1
    kept = np.sort(order[:reached])
    return ids[kept], weights[kept]


def _with_logprobs(row: Floats, token: int, best: int, count: int) -> Sampled:
    shifted = row.astype(np.float64) - float(row[best])
    norm = float(np.log(np.exp(shifted).sum()))
    likeliest = _top(row, count) if count else np.empty(0, np.intp)
    likeliest = likeliest[np.argsort(-shifted[likeliest], kind="stable")]
    return Sampled(
        token, float(shifted[token]) - norm, tuple((int(index), float(shifted[index]) - norm) for index in likeliest)
    )
