"""Is the cloud needed, now that the edge has answered? A learned score.

Signals (all optional; an unknown name is refused):
    answer_chars   length of the whole local answer; the length of `local_answer` if absent
    agreement      share, 0 to 1, of second samples or second local models whose final answer is the same
    peers          how many those were (1 if absent)
    silent         share of them that gave no final answer
    dissent        share of them in the largest group that gave one and the same other answer
`router.answer.plain` is the form in which final answers were compared in training.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from router.answer import final_answer, traits
from router.difficulty import Difficulty
from router.forest import Forest
from router.heads import logistic
from router.weights import Array, InvalidWeights, check_arrays, pack, part, shipped, unpack
from router.wording import Floats, clip, read
from shared.errors import BadRequest

SIGNALS = {"answer_chars": math.inf, "agreement": 1.0, "peers": 1000.0, "silent": 1.0, "dissent": 1.0}
AGREEMENT = 3  # where `describe` puts that signal
DIRECTIONS = 16  # of the prompt's word vector; more of it only added noise
ROUNDS = 3  # what is learned apart: no second opinion, one, or more


def describe(query: str, local_answer: str, signals: Mapping[str, float]) -> list[float]:
    """The answer and its signals as numbers. Raises BadRequest naming a signal that is unknown or out of range."""
    for name, value in signals.items():
        if name not in SIGNALS:
            raise BadRequest(f"unknown signal; known are {', '.join(SIGNALS)}", param=f"signals.{name}")
        if not 0 <= value <= SIGNALS[name] or value == math.inf:
            raise BadRequest("a signal must be a finite number in its range", param=f"signals.{name}")
    length = math.log1p(signals.get("answer_chars", len(local_answer)))
    relative = length - math.log1p(len(query))
    known = "agreement" in signals
    agreement, silent = signals.get("agreement", 0.5), signals.get("silent", 0.0)
    dissent = signals.get("dissent", max(1 - agreement - silent, 0.0) if known else 0.0)
    return [
        length,
        relative,
        float(known),
        agreement,
        silent,
        signals.get("peers", float(known)),
        dissent,
        *traits(clip(query), final_answer(local_answer)),
    ]


def opinions(signals: Mapping[str, float]) -> int:
    """How many second opinions there are, as far as it is learned apart: 0 to ROUNDS - 1."""
    return min(max(int(signals.get("peers", 1.0)), 1), ROUNDS - 1) if "agreement" in signals else 0


@dataclass(frozen=True)
class Hearing:
    """What was learned over Z inputs, for E experts, by how many second opinions there are.

    feature, limit (ROUNDS, E, T, 7), leaf (ROUNDS, E, T, 8): a forest each; curve (2,): slope and intercept from gain
    to probability.
    """

    feature: Array
    limit: Array
    leaf: Array
    curve: Array

    def gain(self, inputs: Floats, gate: Floats, heard: int) -> float:
        """heard: as `opinions` counts them."""
        return float(gate @ self._forests[heard].sums(inputs))

    @functools.cached_property
    def _forests(self) -> list[Forest]:
        return [Forest(*arrays) for arrays in zip(self.feature, self.limit, self.leaf, strict=True)]


@dataclass(frozen=True, slots=True)
class Cascade:
    """The score after the edge's answer: immutable, safe to share between threads."""

    difficulty: Difficulty
    hearing: Hearing

    @classmethod
    def load(cls, difficulty: Difficulty, path: Path | None = None) -> Self:
        """Read the weights at `path` (a .npz), or those the package ships. Raises InvalidWeights."""
        _, arrays = unpack(path or shipped("cascade.npz"))
        cascade = cls(difficulty, part(Hearing, arrays))
        cascade.check()
        return cascade

    def save(self, path: Path, about: Mapping[str, object]) -> None:
        pack(path, {**about}, self.hearing)

    def check(self) -> None:
        hearing, wide = self.hearing, len(self.inputs("", "", {})[0])
        trees = hearing.feature.shape[2] if hearing.feature.ndim == 4 else 0
        experts = len(self.difficulty.names)
        shapes = {
            "feature": (ROUNDS, experts, trees, 7),
            "limit": (ROUNDS, experts, trees, 7),
            "leaf": (ROUNDS, experts, trees, 8),
            "curve": (2,),
        }
        check_arrays(shapes, hearing)
        if hearing.feature.min() < 0 or hearing.feature.max() >= wide:
            raise InvalidWeights("a tree asks for an input that does not exist", param="feature")

    def inputs(self, query: str, local_answer: str, signals: Mapping[str, float]) -> tuple[Floats, Floats]:
        """What the learned part sees, and the gate's share of each expert."""
        wording = read(query)
        encoder = self.difficulty.encoder
        dense = encoder.dense(wording)
        return join(dense, len(wording.measures), describe(query, local_answer, signals)), self.difficulty.gate(dense)

    def score(self, query: str, local_answer: str, signals: Mapping[str, float]) -> float:
        """The calibrated probability that the cloud is right where this answer is wrong."""
        gain = self.hearing.gain(*self.inputs(query, local_answer, signals), opinions(signals))
        return logistic(float(self.hearing.curve[0]) * gain + float(self.hearing.curve[1]))


def join(dense: Floats, measures: int, described: list[float]) -> Floats:
    return np.concatenate([dense[: measures + DIRECTIONS], described])


@functools.cache
def shipped_cascade() -> Cascade:
    return Cascade.load(Difficulty.load())
