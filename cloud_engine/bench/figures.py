"""From samples to the rows of a report: percentiles, medians with their range, one JSON object a line, CSV."""

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated linearly between the two nearest, as numpy does. Raises ValueError without values."""
    if not values:
        raise ValueError("no values")
    ordered, at = sorted(values), (len(values) - 1) * percent / 100
    low = math.floor(at)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (at - low)


def milliseconds(name: str, seconds: Sequence[float], percents: Sequence[int] = (50, 90, 99)) -> Row:
    """`name_ms_p50`, ... and `name_ms_max`; None where nothing was measured."""
    row = {f"{name}_ms_p{at}": round(percentile(seconds, at) * 1e3, 2) if seconds else None for at in percents}
    return row | {f"{name}_ms_max": round(max(seconds) * 1e3, 2) if seconds else None}


def spread(name: str, values: Sequence[float], digits: int) -> Row:
    """The median under the plain name, and the range beside it."""
    figures = {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    return {key: round(value, digits) for key, value in figures.items()}


class Report:
    """Rows as they come: on stdout as JSON, and in a CSV file whose columns are those of the first row."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._columns: list[str] | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        print(json.dumps(row), flush=True)  # noqa: T201 - this is the command's output
        if self._file is None:
            return
        new = self._columns is None
        self._columns = self._columns or list(row)
        with self._file.open("w" if new else "a", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, self._columns, extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow(row)
