"""Calibrates the cascade to a model: from answers that are known to be right or wrong, the logistic curve over the same
signals that are read when it answers. Regression with a ridge on standard inputs, by Newton's method.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from router.cascade_rules import AgreedCurve, Calibration, CascadeRules
from router.confidence import Heard, Tally, agreement, probability
from shared.errors import BadRequest
from shared.schemas import Delta, TokenLogprob, TopLogprob

SIGNALS: Final = ("mean_logprob", "least_logprob", "margin", "entropy")
AGREED: Final = (*SIGNALS, "agreement")
"""Where a second sample was heard."""
_SIGNS: Final = np.array([1, 1, 1, -1, 1])
"""Which way each one says that the model is sure."""
MAX_ROWS: Final = 100_000
MAX_LINE_BYTES: Final = 16 << 20
LEAST_ROWS: Final = 50
LEAST_OF_EITHER: Final = 10
FOLDS: Final = 5
BINS: Final = 10
_RIDGE: Final = 1.0
_STEPS: Final = 50

Floats = NDArray[np.float64]


class Rival(msgspec.Struct, frozen=True):
    token: str
    logprob: float


class Token(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    top_logprobs: tuple[Rival, ...] = ()


class Answered(msgspec.Struct, frozen=True):
    """One line of the table. `logprobs` is a chat completion's `choices[0].logprobs.content`, asked for with
    `top_logprobs: 5`; `digest` is how the SHA-256 of the model's file begins. `second` is the same of another reply to
    the question, sampled, and `second_model` whose it is, if it is another model's."""

    model: str
    right: bool
    logprobs: tuple[Token, ...]
    digest: str = ""
    second: tuple[Token, ...] | None = None
    second_model: str | None = None


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers that were given much the same probability: how many, which on average, what share of them was right."""

    count: int
    said: float
    right: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """Of answers judged by a curve that was not fitted to them; `error` is the expected calibration error.

    `ranked` is the probability that a right answer is thought better of than a wrong one (AUROC): at 0.5 the signals
    say nothing about this model.
    """

    bins: tuple[Bin, ...]
    error: float
    ranked: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """`agreed`: with second samples, where the table has them; `alone`: without."""

    model: str
    calibration: Calibration
    answers: int
    right: float
    alone: Reliability
    agreed: Reliability | None = None


def read(path: Path) -> Iterator[Answered]:
    """Raises BadRequest naming the line that is none, OSError."""
    with path.open("rb") as lines:
        for number in range(1, MAX_ROWS + 2):
            line = lines.readline(MAX_LINE_BYTES)
            if not line:
                return
            if number > MAX_ROWS or (len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")):
                raise BadRequest(f"line {number}: at most {MAX_ROWS} lines of {MAX_LINE_BYTES} bytes", param="outcomes")
            if not line.strip():
                continue
            try:
                yield msgspec.json.decode(line, type=Answered)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise BadRequest(f"line {number}: {error}", param="outcomes") from error


def heard(answered: Answered, rules: CascadeRules) -> Heard:
    """What the cascade would have heard of it under these rules."""
    first = _tallied(answered.logprobs, rules)
    if answered.second is None:
        return first.heard()
    return first.heard(agreed=agreement(first.said, _tallied(answered.second, rules).said))


def _tallied(tokens: Sequence[Token], rules: CascadeRules) -> Tally:
    tally = Tally()
    for at, token in enumerate(tokens, 1):
        top = tuple(TopLogprob(rival.token, rival.logprob) for rival in token.top_logprobs)
        logprobs = (TokenLogprob(token.token, token.logprob, (), top),)
        last = at == len(tokens)
        tally.push(Delta(text=token.token, tokens=1, logprobs=logprobs, finish_reason="stop" if last else None))
        if tally.enough(rules, 0.0):
            break
    return tally


def calibrate(rows: Iterable[Answered], rules: CascadeRules) -> list[Fitted]:
    """By model and digest, in the order of the table. Raises BadRequest where one has too few answers, or second
    samples for some of them only, or of several models."""
    groups: dict[tuple[str, str], list[tuple[Heard, bool]]] = {}
    seconds: dict[tuple[str, str], str | None] = {}
    for row in rows:
        key = row.model, row.digest
        if seconds.setdefault(key, row.second_model) != row.second_model:
            raise BadRequest(f"{row.model}: its second samples are of several models", param="outcomes")
        groups.setdefault(key, []).append((heard(row, rules), row.right))
    return [_fitted(*key, pairs, seconds[key]) for key, pairs in groups.items()]


def _fitted(model: str, digest: str, pairs: Sequence[tuple[Heard, bool]], second: str | None) -> Fitted:
    right = np.array([outcome for _, outcome in pairs], np.float64)
    if len(pairs) < LEAST_ROWS or min(right.sum(), len(right) - right.sum()) < LEAST_OF_EITHER:
        least = f"at least {LEAST_ROWS} answers, {LEAST_OF_EITHER} of them right and {LEAST_OF_EITHER} wrong"
        raise BadRequest(f"{model}: {len(pairs)} answers, {int(right.sum())} right; it takes {least}", param="outcomes")
    told = [one for one, _ in pairs]
    known = {one.agreement is not None for one in told}
    if len(known) > 1:
        raise BadRequest(f"{model}: some answers have a second sample and some have none", param="outcomes")
    alone, agreed = _unseen(told, right)
    return Fitted(
        model=model,
        calibration=_curves(told, right, digest, second),
        answers=len(pairs),
        right=float(right.mean()),
        alone=_reliability(alone, right),
        agreed=_reliability(agreed, right) if known == {True} else None,
    )


def _unseen(told: Sequence[Heard], right: Floats) -> tuple[Floats, Floats]:
    """What curves that were not fitted to an answer say of it: without its second sample, and with it."""
    alone, agreed = np.empty(len(told)), np.empty(len(told))
    for fold in range(FOLDS):
        others = [at for at in range(len(told)) if at % FOLDS != fold]
        curves = _curves([told[at] for at in others], right[others])
        for at in range(fold, len(told), FOLDS):
            alone[at] = probability(replace(told[at], agreement=None), curves)
            agreed[at] = probability(told[at], curves)
    return alone, agreed


def _reliability(said: Floats, right: Floats) -> Reliability:
    bins = tuple(
        Bin(len(part), float(said[part].mean()), float(right[part].mean()))
        for part in np.array_split(np.argsort(said, kind="stable"), BINS)
    )
    error = sum(one.count * abs(one.said - one.right) for one in bins) / len(said)
    return Reliability(bins, error, _ranked(said, right))


def _curves(told: Sequence[Heard], right: Floats, digest: str = "", second: str | None = None) -> Calibration:
    """Without second samples and, if there are any, with them."""
    agreed = None
    if told[0].agreement is not None:
        agreed = AgreedCurve(model=second, **_fit(told, right, AGREED))
    return Calibration(digest=digest, agreed=agreed, **_fit(told, right, SIGNALS))


def _fit(told: Sequence[Heard], right: Floats, names: Sequence[str]) -> dict[str, float]:
    """right (N,) of 0 and 1; both occur. Returns `bias` and a slope for each name. A surer answer is never thought
    worse of: a signal whose slope comes out with the wrong sign, as happens to signals that say much the same, is left
    out."""
    inputs = np.array([[getattr(one, name) for name in names] for one in told], np.float64)
    mean, spread = inputs.mean(0), inputs.std(0)
    spread[spread < 1e-9] = 1.0
    standard, used = (inputs - mean) / spread, np.arange(len(names))
    weights = _regress(standard, right)
    while len(used) and (wrong := weights[1:] * _SIGNS[used]).min() < 0:
        used = np.delete(used, int(wrong.argmin()))
        weights = _regress(standard[:, used], right)
    slopes = np.zeros(len(names))
    slopes[used] = weights[1:] / spread[used]
    return {"bias": float(weights[0] - slopes @ mean), **dict(zip(names, map(float, slopes), strict=True))}


def _regress(standard: Floats, right: Floats) -> Floats:
    """standard (N, K) -> intercept and slopes (K + 1,)."""
    inputs = np.column_stack([np.ones(len(standard)), standard])
    weights, ridge = np.zeros(inputs.shape[1]), np.full(inputs.shape[1], _RIDGE)
    ridge[0] = 1e-6
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (right - p) - ridge * weights
        curvature = (inputs.T * np.maximum(p * (1 - p), 1e-6)) @ inputs + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        weights += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _ranked(said: Floats, right: Floats) -> float:
    """The Mann-Whitney statistic; ties count half."""
    good, bad = np.sort(said[right == 1]), said[right == 0]
    below = np.searchsorted(good, bad, side="right")
    least = np.searchsorted(good, bad, side="left")
    return float((2 * len(good) - below - least).sum() / (2 * len(good) * len(bad)))


def section(fitted: Sequence[Fitted]) -> str:
    """What belongs under `cascade` in the policy."""
    lines = (f"  {json.dumps(one.model)}: {_written(one.calibration.model_dump(exclude_none=True))}" for one in fitted)
    return "\n".join(("calibration:", *lines))


def _written(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_written(one)}" for name, one in value.items()) + "}"
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
