"""The comparison of the edge daemon with other servers, where nothing is measured: does it start, ask, count, end?"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.model]
ROOT = Path(__file__).parents[2]


def test_every_server_is_asked_and_stopped(model_path: Path, tmp_path: Path) -> None:
    """Two clients, two rounds, the daemon alone: all answers whole, memory counted, every row in the CSV."""
    command = [sys.executable, "-m", "tests.benchmarks.edge_rivals", "--model", str(model_path)]
    size = ["--clients", "2", "--requests", "2", "--tokens", "3", "--rounds", "2", "--csv", str(tmp_path / "rows.csv")]
    env = os.environ | {"PYTHONPATH": "deploy"}
    done = subprocess.run(
        [*command, *size], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=170
    )

    assert done.returncode == 0, done.stderr
    medians = {line["bench"]: line["median"] for line in map(json.loads, done.stdout.splitlines())}
    assert medians["2 clients, edge: broken"] == 0
    assert medians["2 clients, edge: tokens/s"] > 0
    assert medians["2 clients, edge: memory, MiB"] > 50
    with (tmp_path / "rows.csv").open(newline="") as stream:
        assert [(row["round"], row["server"]) for row in csv.DictReader(stream)] == [("0", "edge"), ("1", "edge")]
