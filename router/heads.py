"""What was learned from outcomes, as it is stored (`Heads`) and as it is asked (`Panel`)."""

import functools
import math
from dataclasses import dataclass

import numpy as np

from router.forest import Forest
from router.weights import Array
from router.wording import Floats

_FADE = 0.25  # share of its reach beyond which an expert's word fades
_HEARD = 1e-3  # share of the gate below which an expert is not asked
_REACH = 6.0  # standard deviations at which an input is cut off


@dataclass(frozen=True)
class Heads:
    """E experts over D dense inputs.

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

    @functools.cached_property
    def panel(self) -> "Panel":
        return Panel(self)


class Panel:
    """The experts laid out so that one prompt takes few and wide operations. What is left for five numbers at a time is
    plain Python, which is faster there than an array. Immutable, but for the forests that it lays out as they are asked
    for: one for each set of experts."""

    def __init__(self, heads: Heads) -> None:
        self._mean, self._scale = heads.mean, 1 / heads.spread
        self._experts = len(heads.base)
        logits = np.hstack([heads.gate, heads.weak, heads.strong]).astype(np.float64)
        self._slopes, self._offsets = np.ascontiguousarray(logits[:-1]), logits[-1]
        self._base, self._blend = heads.base.tolist(), heads.blend.tolist()
        self._planted = heads.feature, heads.limit, heads.leaf
        self._forests: dict[tuple[int, ...], Forest] = {}
        counted = [expert for expert, (_, _, gram) in enumerate(self._blend) if gram]
        self._column = {expert: column for column, expert in enumerate(counted)}
        width = 1 << max(len(counted) - 1, 0).bit_length()  # rows of 16 or 32 bytes are fetched faster than of 12 or 20
        self._gram = np.zeros((len(heads.gram), width), np.float32)
        self._gram[:, : len(counted)] = heads.gram[:, counted]
        self._middle = heads.middle.astype(np.float32)
        self._whiten = heads.whiten.astype(np.float32, copy=False)
        self._prior, self._floor = np.ascontiguousarray(heads.prior[:-1]), float(heads.prior[-1])
        self._reach = (heads.reach * len(heads.mean)).tolist()

    def gate(self, dense: Floats) -> Floats:
        """Each expert's share, were all of them at home with this prompt."""
        return np.array(_shares(self._logits(self._standard(dense))[: self._experts]))

    def ask(self, dense: Floats, where: Array, weight: Floats) -> tuple[list[float], float]:
        """Each expert's share in this prompt (together 1 at most), and the gain that they predict by these shares and
        the prior by what they leave."""
        inputs = self._standard(dense)
        logits, experts = self._logits(inputs), self._experts
        narrow = inputs.astype(np.float32)
        shares = [
            share * self._familiarity(narrow, expert) if share > _HEARD else 0.0
            for expert, share in enumerate(_shares(logits[:experts]))
        ]
        grams = (weight.astype(np.float32, copy=False) @ self._gram.take(where, axis=0)).tolist()
        gain = (1 - sum(shares)) * self._expected(dense)
        trees = self._trees(shares, dense)
        for expert, share in enumerate(shares):
            if not share:
                continue
            linear, forest, gram = self._blend[expert]
            weak, strong = logits[experts + expert], logits[2 * experts + expert]
            said = linear * (logistic(strong) - logistic(weak))
            if forest:
                said += forest * trees[expert]
            if gram:
                said += gram * (grams[self._column[expert]] + self._base[expert])
            gain += share * said
        return shares, gain

    def _standard(self, dense: Floats) -> Floats:
        inputs = dense - self._mean
        inputs *= self._scale
        np.minimum(inputs, _REACH, out=inputs)
        return np.maximum(inputs, -_REACH, out=inputs)

    def _logits(self, inputs: Floats) -> list[float]:
        """Of the gate, of the edge and of the cloud, each by expert."""
        logits: list[float] = (inputs @ self._slopes + self._offsets).tolist()
        return logits

    def _trees(self, shares: list[float], dense: Floats) -> dict[int, float]:
        """What the trees of those say who are heard: all at once, and no others."""
        asked = tuple(expert for expert, share in enumerate(shares) if share and self._blend[expert][1])
        if not asked:
            return {}
        forest = self._forests.get(asked)
        if forest is None:
            forest = self._forests[asked] = Forest(*(array[list(asked)] for array in self._planted))
        return dict(zip(asked, forest.sums(dense).tolist(), strict=True))

    def _expected(self, dense: Floats) -> float:
        """The prior's gain, by the word vector."""
        return math.tanh(float(dense[-1 - len(self._prior) : -1] @ self._prior)) * 0.25 + self._floor

    def _familiarity(self, inputs: Array, expert: int) -> float:
        """1 where the prompt lies where the expert's training questions lay, falling to 0 with the distance."""
        offset = self._whiten[expert] @ (inputs - self._middle[expert])
        excess = max(float(offset @ offset) / self._reach[expert] - 1, 0.0)
        return math.exp(-((excess / _FADE) ** 2))


def _shares(logits: list[float]) -> list[float]:
    """Softmax."""
    highest = max(logits)
    parts = [math.exp(logit - highest) for logit in logits]
    whole = sum(parts)
    return [part / whole for part in parts]


def logistic(logit: float) -> float:
    return 1 / (1 + math.exp(-min(max(logit, -30.0), 30.0)))
