import csv
import json
from pathlib import Path

import numpy as np
import pytest

from cloud_engine.bench.figures import Report, milliseconds, percentile, spread


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 100])
def test_percentiles_are_numpys(count: int, percent: int) -> None:
    """Interpolated between the two nearest values."""
    values = list(np.random.default_rng(count).random(count))
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_nothing_measured_is_said_openly() -> None:
    """No sample is no number, never a zero."""
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    assert milliseconds("itl", [], (50,)) == {"itl_ms_p50": None, "itl_ms_max": None}
    assert milliseconds("itl", [0.001, 0.003], (50,)) == {"itl_ms_p50": 2.0, "itl_ms_max": 3.0}


def test_a_spread_is_the_median_with_its_range() -> None:
    """Under the plain name and beside it."""
    assert spread("x", [3.04, 1.0, 2.0], 1) == {"x": 2.0, "x_min": 1.0, "x_max": 3.0}


def test_rows_are_lines_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An older file is replaced, not appended to."""
    file = tmp_path / "rows.csv"
    file.write_text("old")
    report = Report(file)
    rows = [{"n": 1, "rate": 2.5}, {"n": 8, "rate": None}]
    for row in rows:
        report.add(row)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    with file.open(newline="") as stream:
        assert list(csv.DictReader(stream)) == [{"n": "1", "rate": "2.5"}, {"n": "8", "rate": ""}]
