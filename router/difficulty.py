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

from router.weights import InvalidWeights, check_arrays, pack, part, shipped, unpack
from router.wording import Floats, Wording, read

_STEPS = 3  # depth of every tree: 7 inner nodes, 8 leaves, in heap order
_FADE = 0.25  # share of its reach beyond which an expert's word fades
_HEARD = 1e-3  # share of the gate below which an expert is not asked
_REACH = 6.0  # standard deviations at which an input is cut off

Array = NDArray[Any]


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
        at = np.minimum(np.searchsorted(self.keys, wording.words), len(self.keys) - 1)
        known = at[self.keys[at] == wording.words]
        share = len(known) / max(len(wording.words), 1)
        if not len(known):
            return np.concatenate([wording.measures, np.zeros(len(self.scale)), [share]])
        mean = self.vectors[known].mean(0, dtype=np.float64) * self.scale - self.centre
        return np.concatenate([wording.measures, mean / (np.linalg.norm(mean) + 1e-9), [share]])

    def sparse(self, wording: Wording) -> tuple[Array, Floats]:
        """Buckets and their unit-length weights: (1 + log count) * rarity."""
        buckets = wording.grams & np.uint64(len(self.rarity) - 1)
        where, count = np.unique(buckets.astype(np.int64), return_counts=True)
        weight = (1 + np.log(count)) * self.rarity[where]
        return where, weight / (np.linalg.norm(weight) + 1e-9)


@dataclass(frozen=True, slots=True)
class Heads:
    """What was learned from outcomes; E experts over D dense inputs.

    mean, spread (D,): what makes inputs standard; gate (D + 1, E); weak, strong (D + 1, E): logits of either side being
    right; feature, limit (E, T, 7), leaf (E, T, 8): trees; gram (2**bits, E), base (E,): n-gram gains; blend (E, 3):
    weights of these three predictions; middle (E, D), whiten (E, D, D), reach (E,): familiarity; prior (K + 1,): gain
    from the word vector alone; curve (2,): slope and intercept from gain to probability; quantiles (E + 1, 101): scores
    of questions unseen by the model that scored them, by expert and over all.
    """

    mean: Array
    spread: Array
    gate: Array
    weak: Array
    strong: Array
    feature: Array
    limit: Array
    leaf: Array
    gram: Array
    base: Array
    blend: Array
    middle: Array
    whiten: Array
    reach: Array
    prior: Array
    curve: Array
    quantiles: Array

    def standard(self, dense: Floats) -> Floats:
        return np.asarray(np.clip((dense - self.mean) / self.spread, -_REACH, _REACH))

    def gate_of(self, inputs: Floats) -> Floats:
        logits = inputs @ self.gate[:-1] + self.gate[-1]
        share = np.exp(logits - logits.max())
        return np.asarray(share / share.sum())

    def familiarity(self, inputs: Floats, expert: int) -> float:
        """1 where the prompt lies where the expert's training questions lay, falling to 0 with the distance."""
        offset = self.whiten[expert] @ (inputs - self.middle[expert]).astype(self.whiten.dtype)
        excess = max(float(offset @ offset) / len(offset) / float(self.reach[expert]) - 1, 0.0)
        return math.exp(-((excess / _FADE) ** 2))

    def expert_gains(self, inputs: Floats, dense: Floats, where: Array, weight: Floats) -> Floats:
        """Each expert's blend of its three predictions of the gain."""
        linear = _logistic(inputs @ self.strong[:-1] + self.strong[-1]) - _logistic(
            inputs @ self.weak[:-1] + self.weak[-1]
        )
        grams = weight @ self.gram[where] + self.base
        trees = walk(self.feature, self.limit, self.leaf, dense)
        return np.asarray(np.einsum("ei,ie->e", self.blend, (linear, trees, grams)))


def walk(feature: Array, limit: Array, leaf: Array, inputs: Floats) -> Floats:
    """Sums of the leaves that `inputs` reaches: feature and limit (..., T, 7), leaf (..., T, 8), trees in heap order;
    the sums have the shape (...)."""
    feature, limit, shape = feature.reshape(-1), limit.reshape(-1), leaf.shape
    first = 7 * np.arange(leaf.size // 8)
    node = np.zeros(len(first), np.int64)
    for _ in range(_STEPS):
        at = first + node
        node = 2 * node + 1 + (inputs[feature[at]] > limit[at])
    leaves = leaf.reshape(-1)[8 * np.arange(len(first)) + node - 7]
    return np.asarray(leaves.reshape(shape[:-1]).sum(-1, dtype=np.float64))


def _logistic(logits: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30.0, 30.0))))


def logistic(logit: float) -> float:
    return 1 / (1 + math.exp(-min(max(logit, -30.0), 30.0)))


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
        return self.heads.gate_of(self.heads.standard(dense))

    def judge(self, dense: Floats, where: Array, weight: Floats) -> Verdict:
        """The verdict over an encoded prompt."""
        heads = self.heads
        inputs = heads.standard(dense)
        share = np.zeros(len(self.names))
        for expert, gate in enumerate(heads.gate_of(inputs)):
            if gate > _HEARD:
                share[expert] = gate * heads.familiarity(inputs, expert)
        gain = float(share @ heads.expert_gains(inputs, dense, where, weight))
        known = float(share.sum())
        vector = dense[-1 - len(self.encoder.scale) : -1]
        gain += (1 - known) * float(np.tanh(vector @ heads.prior[:-1]) * 0.25 + heads.prior[-1])
        score = logistic(float(heads.curve[0]) * gain + float(heads.curve[1]))
        return Verdict(score, gain, known, dict(zip(self.names, map(float, share), strict=True)))

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
