"""What a router's scores are worth on a table of outcomes: the curve of quality over cost, and how well they are
calibrated. Values in, values out.

APGR (the average part of the gap that is recovered) and CPT (the calls it takes to recover a part of it) are those of
`router.outcomes`: exact over every threshold, tied scores share their gain evenly.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from router import outcomes
from router.calibrate import Bin
from router.weights import InvalidWeights, shipped

MARKS: Final = 101
"""Shares of cloud calls, 0 to 1, at which a curve is kept."""
BINS: Final = 10
TARGETS: Final = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Shares for which thresholds are tried."""
MEASURED: Final = "measured.json"

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scored:
    """A table of N questions: what each side's answer is worth (0 to 1), the router's score, a domain; all (N,)."""

    name: str
    edge: Floats
    cloud: Floats
    score: Floats
    domain: Sequence[str]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of some questions. `apgr` and the calls, as shares, are None where the cloud is no better than the edge."""

    name: str
    rows: int
    edge: float
    cloud: float
    apgr: float | None
    cpt50: float | None
    cpt80: float | None


@dataclass(frozen=True, slots=True)
class Point:
    """Where a threshold puts a router: what share of the calls goes to the cloud, and the quality of the answers."""

    threshold: float
    cloud_share: float
    quality: float


@dataclass(frozen=True, slots=True)
class Assessment:
    """`quality`, `oracle` and `thresholds` are by share of cloud calls, at MARKS marks; the oracle knows both outcomes.

    `bins` and `error` (expected calibration error): scores as the probability that the cloud is right where the edge
    is wrong, against how often it was.
    """

    figures: Figures
    quality: tuple[float, ...]
    oracle: tuple[float, ...]
    oracle_apgr: float | None
    thresholds: tuple[float, ...]
    bins: tuple[Bin, ...]
    error: float
    domains: tuple[Figures, ...]

    def at_share(self, share: float) -> float:
        """The quality there."""
        return float(np.interp(share, _marks(), self.quality))

    def at(self, threshold: float) -> Point:
        """Where this threshold puts the router, to a hundredth of a share."""
        marks, falling = _marks(), np.array(self.thresholds)
        above = int((falling >= threshold).sum())
        if above in (0, MARKS):
            share = float(above == MARKS)
        else:
            high, low = falling[above - 1], falling[above]
            share = float(marks[above - 1] + (high - threshold) / (high - low) * (marks[above] - marks[above - 1]))
        return Point(threshold, share, self.at_share(share))

    def recovered(self, quality: float) -> float | None:
        """The part of the gap between the sides that this quality recovers."""
        gap = self.figures.cloud - self.figures.edge
        return (quality - self.figures.edge) / gap if gap > 0 else None


def assess(table: Scored) -> Assessment:
    """The table has at least one row, and its numbers are finite."""
    edge, cloud, score = table.edge, table.cloud, table.score
    bins = reliability(score, cloud > edge)
    domains = np.array(table.domain)
    named = [name for name in np.unique(domains).tolist() if name]
    figures = figures_of(table.name, edge, cloud, score)
    return Assessment(
        figures=figures,
        quality=_curve(edge, cloud, score),
        oracle=_curve(edge, cloud, cloud - edge),
        oracle_apgr=None if figures.apgr is None else outcomes.apgr(edge, cloud, cloud - edge),
        thresholds=tuple(np.quantile(score, 1 - _marks()).round(6).tolist()),
        bins=bins,
        error=sum(one.count * abs(one.said - one.right) for one in bins) / len(score),
        domains=tuple(
            figures_of(name, edge[own], cloud[own], score[own]) for name in named for own in [domains == name]
        ),
    )


def pooled(tables: Sequence[Scored]) -> Scored:
    """All questions of these tables as one, whose domains they are: what a threshold for their mixture is for."""
    edge, cloud, score = (
        np.concatenate([getattr(table, name) for table in tables]) for name in ("edge", "cloud", "score")
    )
    return Scored("all tables together", edge, cloud, score, [table.name for table in tables for _ in table.score])


def figures_of(name: str, edge: Floats, cloud: Floats, score: Floats) -> Figures:
    recovers = cloud.mean() - edge.mean() > 1e-9
    apgr = outcomes.apgr(edge, cloud, score) if recovers else None
    half, most = (outcomes.call_share(edge, cloud, score, part) / 100 if recovers else None for part in (0.5, 0.8))
    return Figures(name, len(score), float(edge.mean()), float(cloud.mean()), apgr, half, most)


def reliability(said: Floats, came: NDArray[np.bool_]) -> tuple[Bin, ...]:
    """Equally filled bins, the least probable first; fewer where there are fewer rows than bins."""
    parts = np.array_split(np.argsort(said, kind="stable"), min(BINS, len(said)))
    return tuple(Bin(len(part), float(said[part].mean()), float(came[part].mean())) for part in parts)


def _curve(edge: Floats, cloud: Floats, score: Floats) -> tuple[float, ...]:
    cost, quality = outcomes.curve(edge, cloud, score)
    return tuple(np.interp(_marks(), cost, quality).round(6).tolist())


def _marks() -> Floats:
    return np.linspace(0, 1, MARKS)


def save(path: Path, assessments: Sequence[Assessment]) -> None:
    path.write_bytes(msgspec.json.encode(assessments) + b"\n")


@functools.cache
def shipped_assessments() -> tuple[Assessment, ...]:
    """Of the weights the package ships, on rows unseen by the model that scored them. Raises InvalidWeights."""
    try:
        return msgspec.json.decode(shipped(MEASURED).read_bytes(), type=tuple[Assessment, ...])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidWeights(f"what was measured cannot be read: {type(error).__name__}", param=MEASURED) from error
