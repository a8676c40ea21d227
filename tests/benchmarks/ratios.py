"""Medians with their range, one JSON object a line: the form of every benchmark's rows."""

import json
import statistics
from collections.abc import Iterable, Sequence

Sample = tuple[str, Sequence[float]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range of a sample, to four significant places."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def show(rows: Iterable[Sample]) -> None:
    for name, values in rows:
        print(json.dumps({"bench": name, "rounds": len(values), **spread(values)}), flush=True)


def by_pairs(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ratios round by round: what the machine did in a round, it did to both."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]
