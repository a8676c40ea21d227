import math

import pytest
import torch
import torch.nn.functional as F

from cloud_engine.model import rowwise
from cloud_engine.model.rowwise import greatest, rms_norm, rotate, silu_gate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def close(actual, expected, dtype):
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def compiled(request, monkeypatch):
    """Both ways; the compiled one must be there, or it would not be tested."""
    if request.param:
        assert rowwise._loaded("norm", torch.float32) is not None
    else:
        monkeypatch.setattr(rowwise, "_native", lambda name, x: None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 48), (3, 50), (700, 576), (5, 4, 32)])
def test_norm(compiled, shape, dtype):
    """Rows or heads, of any size, many or none; a view whose rows lie apart too."""
    x, weight = torch.randn(*shape[:-1], shape[-1] + 8).to(dtype)[..., :-8] * 3, torch.randn(shape[-1]).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    close(rms_norm(x, weight, 1e-5), exact.float(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 50, 1536])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_gate(compiled, rows, size, dtype):
    """Also where e to the power of x leaves float32, on both sides."""
    x = torch.randn(rows, 2 * size).to(dtype) * 4
    if rows:
        x[0, :4] = torch.tensor([-200.0, 200.0, -88.5, 0.0])
    gate, up = x.float().chunk(2, dim=-1)
    actual = silu_gate(x)
    assert actual.isfinite().all()
    close(actual, F.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [12, 32, 64])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_rotation(compiled, rows, dim, dtype):
    """Heads that are a part of a wider row, turned pair by pair; their lengths stay."""
    x = torch.randn(rows, 7, dim).to(dtype)[:, 1:6]
    angles = torch.randn(rows, 1, dim // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = x.float().chunk(2, dim=-1)
    expected = torch.cat((first * cos.float() - second * sin.float(), second * cos.float() + first * sin.float()), -1)
    close(rotate(x, cos, sin), expected, dtype)


def test_a_number_that_is_not_one_stays_so():
    """Nothing turns NaN into a number on its way to the sampler, which gives up on that row alone."""
    x = torch.ones(2, 64)
    x[1, 3] = torch.nan
    for out in (rms_norm(x, torch.ones(64), 1e-5), silu_gate(x)):
        assert out[0].isfinite().all()
        assert out[1].isnan().any()
    assert silu_gate(x.bfloat16())[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 100, 4099])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_greatest(compiled, rows, size, dtype):
    """The first of equal ones, wherever they are; rows that are infinite, or hold a NaN, say so."""
    x = torch.randint(-9, 9, (rows, size)).to(dtype)
    if rows == 40:
        x[1], x[2, size // 2 :], x[3, -1], x[4, size // 3] = -math.inf, math.inf, math.nan, math.nan
    values, places = greatest(x)
    expected, first = x.float().max(dim=-1)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(places, first)
