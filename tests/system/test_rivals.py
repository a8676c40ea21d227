"""The comparison with other engines, at a size where nothing is measured: does it count, alternate and end?"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]


def compare(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks.rivals", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=170)


def test_each_round_asks_every_engine_the_same(tmp_path: Path) -> None:
    """Fixed and mixed lengths, ours and transformers in turning order, ratios at the end, everything in the CSV."""
    model, file = tiny_llama.save(tmp_path / "model"), tmp_path / "rows.csv"
    done = compare("--model", str(model), "--rows", "2:8/4", "3:mix6/4", "--rounds", "2", "--csv", str(file))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    measured = [line for line in lines if "engine" in line]
    ours, theirs = "ours dtype=float32", "transformers float32"
    assert [line["engine"] for line in measured] == [ours, theirs, ours, theirs, theirs, ours, theirs, ours]
    assert [line["tokens"] for line in measured if line["row"] == "2:8/4"] == [8] * 4
    for number in range(2):
        mixed = [line["tokens"] for line in measured if line["row"] == "3:mix6/4" and line["round"] == number]
        assert mixed[0] == mixed[1] >= 12
    assert [line["bench"] for line in lines if "bench" in line][2] == f"2:8/4 {ours} / {theirs}"
    with file.open(newline="") as stream:
        assert [row["engine"] for row in csv.DictReader(stream)] == [line["engine"] for line in measured]


def test_a_row_that_is_none_is_refused(tmp_path: Path) -> None:
    """Before anything is loaded."""
    for wrong in ("8:", "8:mix1"):
        done = compare("--model", str(tmp_path), "--rows", wrong)
        assert (done.returncode, "N:IN/OUT" in done.stderr) == (2, True)
