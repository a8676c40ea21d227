import pytest
import torch

from cloud_engine.bench.figures import Report
from cloud_engine.bench.floor import bandwidth, floor
from cloud_engine.bench.offline import Plan, run
from cloud_engine.engine.config import EngineConfig
from cloud_engine.model.shapes import SHAPES, step_bytes


class Rows(Report):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.added: list[dict[str, object]] = []

    def add(self, row) -> None:
        self.added.append(row)


def test_bandwidth_is_of_the_best_copy():
    """Bytes read and written, by a clock that says how long each copy took."""
    times = iter([0.0, 9.0, 10.0, 12.0, *(index * 5.0 for index in range(6, 18))])
    assert bandwidth(torch.device("cpu"), 4000, lambda: next(times)) == 2 * 4000 / 2.0


def test_the_floor_is_bytes_by_bandwidth():
    """Milliseconds of a step, tokens a second of all rows."""
    config = EngineConfig(dtype="bfloat16", kv_dtype="fp8")
    needed = step_bytes(SHAPES["0.6b"], 8, 64, value_bytes=2, kv_value_bytes=1)
    columns = floor(SHAPES["0.6b"], config, 8, 64, 2e12)
    assert columns["floor_ms"] == pytest.approx(needed / 2e12 * 1e3, abs=1e-3)
    assert columns["floor_tok_s"] == pytest.approx(8 / (needed / 2e12), abs=0.1)
    assert columns["memory_gb_s"] == 2000.0


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_a_shape_is_measured_without_any_file(shape, monkeypatch):
    """Random weights, a row for each number of requests, the floor beside it; at both depths of launching ahead."""
    monkeypatch.setattr("cloud_engine.bench.offline.COPIED_BYTES", 1 << 20)
    for depth in (0, 1):
        rows = Rows()
        run(SHAPES[shape], Plan([1, 3], 8, 4), {"block_size": 4, "async_depth": depth}, rows)
        assert [row["n"] for row in rows.added] == [1, 3]
        assert all(row["floor_tok_s"] > 0 and row["out_tok_s"] > 0 and row["memory_gb_s"] > 0 for row in rows.added)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_shape_is_measured_on_cuda():
    """The whole path of the bench on the device: weights made there, graphs, steps launched ahead."""
    rows = Rows()
    run(SHAPES["0.6b"], Plan([1, 4], 16, 8), {"device": "cuda", "dtype": "bfloat16"}, rows)
    assert [row["n"] for row in rows.added] == [1, 4]
