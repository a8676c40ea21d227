"""Is the cloud needed, now that the edge has answered? A learned score.

Signals (all optional; an unknown name is refused):
    answer_chars   length of the whole local answer; the length of `local_answer` if absent
    agreement      share, 0 to 1, of second samples or second local models whose final answer is the same
    peers          how many those were (1 if absent)
    silent         share of them that gave no final answer
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from router.difficulty import Difficulty, logistic, walk
from router.weights import Array, InvalidWeights, check_arrays, pack, part, shipped, unpack
from router.wording import Floats, read
from shared.errors import BadRequest

SIGNALS = {"answer_chars": math.inf, "agreement": 1.0, "peers": 1000.0, "silent": 1.0}
DIRECTIONS = 16  # of the prompt's word vector; more of it only added noise
_SHORT = 60  # characters up to which an answer is taken to be the final answer itself
_MARKED = re.compile(
    r'\\boxed\{([^{}]{1,60})\}|"answer"\s*:\s*"?([^"\n}]{1,60})|answer is:?\s*\(?([^\n.()]{1,60})', re.IGNORECASE
)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def final_answer(text: str) -> str:
    """What the answer comes down to: itself if short, else what it marks as its answer, else its last number."""
    text = text.strip()
    if len(text) <= _SHORT:
        return text
    tail = text[-2000:]
    marked = _MARKED.findall(tail)
    if marked:
        return str(next(found for found in marked[-1] if found)).strip()
    numbers = _NUMBER.findall(tail[-200:])
    return str(numbers[-1]) if numbers else ""


def describe(query_chars: int, local_answer: str, signals: Mapping[str, float]) -> list[float]:
    """The answer and its signals as numbers. Raises BadRequest naming a signal that is unknown or out of range."""
    for name, value in signals.items():
        if name not in SIGNALS:
            raise BadRequest(f"unknown signal; known are {', '.join(SIGNALS)}", param=f"signals.{name}")
        if not 0 <= value <= SIGNALS[name] or value == math.inf:
            raise BadRequest("a signal must be a finite number in its range", param=f"signals.{name}")
    final = final_answer(local_answer)
    empty = final.lower() in {"", "none", "nan"}
    number = _NUMBER.fullmatch(final)
    value = float(final.replace(",", "")) if number and len(final) < 20 else 0.0
    length = math.log1p(signals.get("answer_chars", len(local_answer)))
    relative = length - math.log1p(query_chars)
    known = "agreement" in signals
    agreement = signals.get("agreement", 0.5)
    return [
        length,
        relative,
        float(empty),
        float(len(final)),
        float(number is not None),
        math.log1p(min(abs(value), 1e9)),
        float(value % 1 != 0),
        float(ord(final.lower()) - 97) if len(final) == 1 and final.isalpha() and final.isascii() else -1.0,
        float(known),
        agreement,
        signals.get("silent", 0.0),
        signals.get("peers", float(known)),
        agreement * length,
        agreement * relative,
    ]


@dataclass(frozen=True, slots=True)
class Hearing:
    """What was learned over Z inputs.

    feature, limit (1, T, 7), leaf (1, T, 8): one forest; linear (Z + 1, E): gain per expert from inputs made standard
    by mean, spread (Z,); curve (2,): slope and intercept from gain to probability.
    """

    feature: Array
    limit: Array
    leaf: Array
    mean: Array
    spread: Array
    linear: Array
    curve: Array

    def gain(self, inputs: Floats, gate: Floats) -> float:
        standard = np.clip((inputs - self.mean) / self.spread, -6, 6)
        linear = float((standard @ self.linear[:-1] + self.linear[-1]) @ gate)
        return (linear + float(walk(self.feature[0], self.limit[0], self.leaf[0], inputs))) / 2


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
        trees = hearing.feature.shape[1] if hearing.feature.ndim == 3 else 0
        shapes = {"feature": (1, trees, 7), "limit": (1, trees, 7), "leaf": (1, trees, 8),
                  "mean": (wide,), "spread": (wide,),
                  "linear": (wide + 1, len(self.difficulty.names)), "curve": (2,)}  # fmt: skip
        check_arrays(shapes, hearing)
        if hearing.feature.min() < 0 or hearing.feature.max() >= wide:
            raise InvalidWeights("a tree asks for an input that does not exist", param="feature")

    def inputs(self, query: str, local_answer: str, signals: Mapping[str, float]) -> tuple[Floats, Floats]:
        """What the learned part sees, and the gate's share of each expert."""
        wording = read(query)
        encoder = self.difficulty.encoder
        dense = encoder.dense(wording)
        return join(dense, len(wording.measures), describe(len(query), local_answer, signals)), self.difficulty.gate(
            dense
        )

    def score(self, query: str, local_answer: str, signals: Mapping[str, float]) -> float:
        """The calibrated probability that the cloud is right where this answer is wrong."""
        gain = self.hearing.gain(*self.inputs(query, local_answer, signals))
        return logistic(float(self.hearing.curve[0]) * gain + float(self.hearing.curve[1]))


def join(dense: Floats, measures: int, described: list[float]) -> Floats:
    return np.concatenate([dense[: measures + DIRECTIONS], described])


@functools.cache
def shipped_cascade() -> Cascade:
    return Cascade.load(Difficulty.load())
