"""How much a prompt needs the cloud: a learned score, under a millisecond, numpy only. DIFFICULTY.md has the numbers.

A prompt is encoded once: text measures, mean of static word vectors, hashed n-grams. One expert per kind of question
that the outcome tables know predicts the gain, P(cloud right) - P(edge right). A gate mixes the experts (Jacobs et al.
1991), and where the prompt looks like nothing they were trained on (Mahalanobis distance, as Lee et al. 2018) a prior
takes over. The score is the calibrated probability that the cloud is right where the edge is wrong.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from router.heads import Heads, logistic
from router.weights import Array, InvalidWeights, check_arrays, pack, part, shipped, unpack
from router.wording import Floats, Wording, read


@dataclass(frozen=True, slots=True)
class Encoder:
    """Static tables that turn words and n-grams into numbers; learned without any outcome.

    keys (V,) sorted uint64; vectors (V, K) int8 with scale (K,); centre (K,); rarity (2**bits,): inverse document
    frequency of an n-gram bucket.
    """

    keys: Array
    vectors: Array
    scale: Array
    centre: Array
    rarity: Array

    def dense(self, wording: Wording) -> Floats:
        """Text measures, then the unit-length mean of the known words' vectors, then the share of words known."""
        words = wording.words.copy()
        words.sort()  # neighbours are looked for near each other
        at = self.keys.searchsorted(words)
        np.minimum(at, len(self.keys) - 1, out=at)
        known = at[self.keys.take(at) == words]
        share = len(known) / max(len(words), 1)
        if not len(known):
            return np.concatenate([wording.measures, np.zeros(len(self.scale)), [share]])
        total = np.ones(len(known), np.float32) @ self.vectors.take(known, axis=0).astype(np.float32)  # exact
        mean = np.divide(total, len(known), dtype=np.float64)
        mean *= self.scale
        mean -= self.centre
        mean /= math.sqrt(mean @ mean) + 1e-9
        return np.concatenate([wording.measures, mean, [share]])

    def sparse(self, wording: Wording) -> tuple[Array, Floats]:
        """Buckets, rising, and their unit-length weights: (1 + log count) * rarity."""
        last = len(self.rarity) - 1
        buckets: NDArray[np.unsignedinteger[Any]] = wording.grams.astype(np.uint16 if last < 1 << 16 else np.uint64)
        buckets &= last
        buckets.sort(kind="stable")  # of 16 bits: by digits, in linear time
        edge = np.empty(len(buckets) + 1, bool)
        edge[0] = edge[-1] = True
        np.not_equal(buckets[1:], buckets[:-1], out=edge[1:-1])
        (edges,) = edge.nonzero()
        where = buckets[edges[:-1]].astype(np.intp)
        weight = np.log(edges[1:] - edges[:-1])
        weight += 1
        weight *= self.rarity.take(where)
        weight /= math.sqrt(weight @ weight) + 1e-9
        return where, weight


@dataclass(frozen=True, slots=True)
class Verdict:
    """One prompt's difficulty and where it came from. `experts`: each one's share; the prior has the rest."""

    score: float
    gain: float
    familiarity: float
    experts: dict[str, float]


@dataclass(frozen=True, slots=True)
class Outlook:
    """A threshold and what it should bring: the share sent to the cloud, the part of the quality gap recovered."""

    threshold: float
    cloud_share: float
    recovered: float


@dataclass(frozen=True, slots=True)
class Difficulty:
    """The learned difficulty: immutable, safe to share between threads."""

    encoder: Encoder
    heads: Heads
    names: tuple[str, ...]

    @classmethod
    def load(cls, path: Path | None = None) -> Self:
        """Read the weights at `path` (a .npz), or those the package ships. Raises InvalidWeights."""
        about, arrays = unpack(path or shipped("difficulty.npz"))
        model = cls(part(Encoder, arrays), part(Heads, arrays), tuple(map(str, about.get("experts", ()))))
        model.check()
        return model

    def save(self, path: Path, about: Mapping[str, object]) -> None:
        pack(path, {**about, "experts": self.names}, self.encoder, self.heads)

    def check(self) -> None:
        """Raise InvalidWeights unless every array has the shape and the finite numbers the arithmetic needs."""
        encoder, heads, experts = self.encoder, self.heads, len(self.names)
        wide = len(read("").measures) + len(encoder.scale) + 1
        trees, buckets = heads.feature.shape[1] if heads.feature.ndim == 3 else 0, len(encoder.rarity)
        shapes = {
            "vectors": (len(encoder.keys), len(encoder.scale)), "centre": encoder.scale.shape,
            "mean": (wide,), "spread": (wide,),
            "gate": (wide + 1, experts), "weak": (wide + 1, experts), "strong": (wide + 1, experts),
            "feature": (experts, trees, 7), "limit": (experts, trees, 7), "leaf": (experts, trees, 8),
            "gram": (buckets, experts), "base": (experts,), "blend": (experts, 3), "middle": (experts, wide),
            "whiten": (experts, wide, wide), "reach": (experts,), "prior": (len(encoder.scale) + 1,), "curve": (2,),
            "quantiles": (experts + 1, 101),
        }  # fmt: skip
        check_arrays(shapes, encoder, heads)
        if buckets & (buckets - 1):
            raise InvalidWeights("the number of n-gram buckets is no power of two", param="rarity")
        if heads.feature.min() < 0 or heads.feature.max() >= wide:
            raise InvalidWeights("a tree asks for an input that does not exist", param="feature")

    def verdict(self, text: str) -> Verdict:
        wording = read(text)
        return self.judge(self.encoder.dense(wording), *self.encoder.sparse(wording))

    def gate(self, dense: Floats) -> Floats:
        return self.heads.panel.gate(dense)

    def judge(self, dense: Floats, where: Array, weight: Floats) -> Verdict:
        """The verdict over an encoded prompt."""
        shares, gain = self.heads.panel.ask(dense, where, weight)
        slope, intercept = self.heads.curve.tolist()
        score = logistic(slope * gain + intercept)
        return Verdict(score, gain, sum(shares), dict(zip(self.names, shares, strict=True)))

    def score(self, texts: Sequence[str]) -> list[float]:
        """Per text, the calibrated probability that the cloud is needed: right where the edge is wrong."""
        return [self.verdict(text).score for text in texts]

    def threshold(self, share: float, expert: str | None = None) -> float:
        """The score at or above which `share` (0 to 1) of prompts like the outcome tables' go to the cloud."""
        row = self.heads.quantiles[self.names.index(expert) if expert else -1]
        return float(np.interp(1 - share, np.linspace(0, 1, len(row)), row))

    def at_share(self, share: float, expert: str | None = None) -> Outlook:
        """What to expect when `share` of the prompts may go to the cloud ("at most 30 % to the cloud")."""
        shares, recovered = self._recovery(expert)
        return Outlook(self.threshold(share, expert), share, float(np.interp(share, shares, recovered)))

    def at_recovery(self, recovered: float, expert: str | None = None) -> Outlook:
        """The smallest cloud share expected to recover that part of the gap ("keep 95 % of the gain")."""
        shares, reached = self._recovery(expert)
        first = int(np.argmax(reached >= recovered - 1e-9))
        return Outlook(self.threshold(float(shares[first]), expert), float(shares[first]), float(reached[first]))

    def _recovery(self, expert: str | None) -> tuple[Floats, Floats]:
        """Cloud shares 0, 0.01 ... 1 and the part of the gap each should recover, from the calibrated scores."""
        shares = np.linspace(0, 1, 101)
        scores = np.array([self.threshold(share, expert) for share in shares])
        gains = (np.log(scores / (1 - scores)) - self.heads.curve[1]) / self.heads.curve[0]
        gathered = np.r_[0, np.cumsum((gains[1:] + gains[:-1]) / 2)]
        return shares, gathered / gathered[-1]


@functools.cache
def _shipped() -> Difficulty | InvalidWeights:
    """What cannot be read is tried once: a request must not wait for that again."""
    try:
        return Difficulty.load()
    except InvalidWeights as error:
        return error


def shipped_difficulty() -> Difficulty:
    """Of the weights the package ships, read at the first call. Raises InvalidWeights."""
    found = _shipped()
    if isinstance(found, InvalidWeights):
        raise found.with_traceback(None)
    return found


def score(texts: Sequence[str]) -> list[float]:
    """`Difficulty.score` of the weights the package ships."""
    return shipped_difficulty().score(texts)


def score_after(query: str, local_answer: str, signals: Mapping[str, float] | None = None) -> float:
    """`Cascade.score` of the weights the package ships: is the cloud needed, now that the edge has answered?"""
    from router.cascade import shipped_cascade

    return shipped_cascade().score(query, local_answer, signals or {})
