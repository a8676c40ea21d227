import itertools
import math

import pytest
import tiny_models
import torch
import torch.nn.functional as F

from cloud_engine.model import packing
from cloud_engine.model.layers import Empty, Norm
from cloud_engine.model.packing import Int8, Int8Panels, Panels, Reordered, Surrounded, pack, quantize
from cloud_engine.model.projection import Projection
from cloud_engine.model.rowwise import silu_gate
from cloud_engine.native.library import BFLOAT16, FLOAT32, INT8, features

ROWS = [1, 2, 3, 4, 5, 6, 7, 12, 13, 25, 64]
MANY = [*ROWS, 150]  # so many that no tile asks for the next panel
SHAPES = [(32, 64), (33, 64), (15, 128), (100, 576), (64, 192)]

needs_bfloat16 = pytest.mark.skipif(not features() & BFLOAT16, reason="no AVX512-BF16 here, or no compiler")
needs_int8 = pytest.mark.skipif(not features() & INT8, reason="no AVX512-VNNI here, or no compiler")


def problem(rows, shape, dtype, *, bias):
    noise = torch.Generator().manual_seed(rows + shape[0])
    weight = torch.randn(shape, generator=noise).to(dtype)
    x = torch.randn(rows, shape[1] + 8, generator=noise).to(dtype)[:, :-8]  # rows that lie apart
    return weight, x, torch.randn(shape[0], generator=noise).to(dtype) if bias else None


@pytest.mark.skipif(not features() & FLOAT32, reason="no AVX512 here, or no compiler")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 7)])
@pytest.mark.parametrize("rows", MANY)
def test_float32_panels_give_the_product(rows, shape, bias):
    """As exact as any float32 product, whatever the numbers of rows and outputs."""
    weight, x, bias = problem(rows, shape, torch.float32, bias=bias)
    packed = pack(weight, bias)
    assert isinstance(packed, Panels)
    torch.testing.assert_close(packed(x), F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)


def test_without_the_compiled_kernels_onednn_packs(monkeypatch):
    """Another processor, or no compiler: the same product."""
    monkeypatch.setattr(packing, "features", lambda: 0)
    weight, x = torch.randn(33, 64), torch.randn(5, 64)
    packed = pack(weight, None)
    assert isinstance(packed, Reordered)
    torch.testing.assert_close(packed(x), x @ weight.T, atol=1e-4, rtol=1e-5)
    assert pack(weight.bfloat16(), None) is None
    assert isinstance(pack(weight, None, "int8"), Int8)


@needs_bfloat16
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 6)])
@pytest.mark.parametrize("rows", MANY)
def test_bfloat16_panels_give_the_product(rows, shape, bias):
    """Any number of rows and outputs, with a bias or without: the float32 product to bfloat16's last bit."""
    weight, x, bias = problem(rows, shape, torch.bfloat16, bias=bias)
    packed = pack(weight, bias)
    assert isinstance(packed, Panels)
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(packed(x).float(), expected, atol=0.02, rtol=1 / 128)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_int8_panels_multiply_both_rounded_factors(rows, shape, dtype):
    """Exactly the product of the rounded weight and the rows rounded group by group."""
    weight, x, bias = problem(rows, shape, dtype, bias=rows % 2 == 0)
    packed = pack(weight, bias, "int8")
    assert isinstance(packed, Int8Panels)
    rounded = [values.view(*scales.shape, -1) * scales[..., None] for values, scales in map(quantize, (x, weight))]
    expected = rounded[0].flatten(1) @ rounded[1].flatten(1).T + (0 if bias is None else bias.float())
    # Half of a group's peak lies between two integers: a last bit decides, and in bfloat16 that comes up often.
    atol, rtol = (1e-3, 1e-5) if dtype == torch.float32 else (0.3, 1 / 128)
    torch.testing.assert_close(packed(x).float(), expected, atol=atol, rtol=rtol)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_row_does_not_depend_on_what_is_computed_with_it(dtype):
    """To the last bit: alone, in tiles of any number of rows, and wherever it is among them."""
    weight, x, _ = problem(64, (96, 192), dtype, bias=False)
    packed = pack(weight, None, "int8")
    alone = torch.cat([packed(row[None]) for row in x])
    for rows in (2, 3, 5, 8, 13, 64):
        together = torch.cat([packed(part) for part in x.split(rows)])
        assert together.equal(alone)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_weight_that_a_rank_has_no_part_of_stays(quantization):
    """Nothing to pack, and no error."""
    assert pack(torch.empty(0, 64), None, quantization) is None


KINDS = {"float32": (torch.float32, "none", FLOAT32), "bfloat16": (torch.bfloat16, "none", BFLOAT16)}
KINDS |= {"int8": (torch.float32, "int8", INT8), "int8 of bfloat16": (torch.bfloat16, "int8", INT8)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (50, 64)])
@pytest.mark.parametrize("rows", [1, 30])
def test_what_surrounds_a_product_is_one_pass(rows, shape, around, kind):
    """gate(norm(x) * weight + bias) + added, each of the four there or not, is what torch gives step by step; with
    25 columns too, which the kernel has no gates for."""
    dtype, quantization, feature = KINDS[kind]
    if not features() & feature:
        pytest.skip("not this processor, or no compiler")
    normed, gated, biased, adds = around
    weight, x, bias = problem(rows, shape, dtype, bias=biased)
    weight = weight / shape[1] ** 0.5
    norm = Norm(shape[1], 1e-5, Empty(lambda *sizes: torch.rand(sizes).to(dtype) + 0.5)) if normed else None
    added = torch.randn(rows, shape[0] // 2 if gated else shape[0]).to(dtype) if adds else None
    packed, plain = (Projection(weight.clone(), bias, gate=silu_gate if gated else None) for _ in range(2))
    packed.pack(quantization)
    assert isinstance(packed._packed, Surrounded)
    assert packed._packed.gated == (gated and shape[0] % 32 == 0)
    exact, actual = plain(x, norm, added).float(), packed(x, norm, added).float()
    tolerance = 0.04 if quantization == "int8" else 1e-5 if dtype == torch.float32 else 0.01
    assert actual.shape == exact.shape
    assert (actual - exact).norm() <= tolerance * exact.norm()


@pytest.mark.skipif(not features() & FLOAT32, reason="no AVX512 here, or no compiler")
@pytest.mark.parametrize("shape", [(3, 31), (2, 32), (3, 32)])
def test_what_does_not_fit_is_refused(shape):
    """The kernel checks nothing."""
    packed, added = pack(torch.randn(32, 64), None), torch.ones(shape)
    with pytest.raises(ValueError, match="takes 32 columns"):
        packed(torch.randn(3, 64), None, added.bfloat16() if shape == (3, 32) else added)


@needs_int8
def test_values_that_need_care():
    """Rows of zeros, and rows a million times larger than their neighbours."""
    weight, x, _ = problem(4, (32, 128), torch.float32, bias=False)
    weight[3] = 0
    x[1], x[2] = 0, x[2] * 1e6
    actual, expected = pack(weight, None, "int8")(x), x @ weight.T
    assert actual[1].eq(0).all()
    assert actual[:, 3].eq(0).all()
    for row in (0, 2, 3):
        assert (actual[row] - expected[row]).norm() < 0.02 * expected[row].norm()


@pytest.mark.parametrize("inputs", [64, 80, 7])
def test_the_plain_int8_form_rounds_the_weight_alone(inputs):
    """As on a GPU; inputs that are no multiple of a group's 64 have smaller groups."""
    weight, x = torch.randn(9, inputs), torch.randn(5, inputs)
    values, scales = quantize(weight)
    size = math.gcd(inputs, packing.GROUP)
    assert values.abs().view(9, -1, size).amax(-1).eq(127).all()
    assert (
        values.view(9, -1, size) * scales[..., None] - weight.view(9, -1, size)
    ).abs().amax() <= scales.max() / 2 + 1e-6
    actual = Int8(values, scales, None)(x)
    torch.testing.assert_close(actual, x @ (values.view(9, -1, size) * scales[..., None]).view(9, -1).T)


@pytest.mark.parametrize("shape", [{}, {"hidden_size": 64, "intermediate_size": 128}], ids=["odd", "groups of 64"])
@pytest.mark.parametrize("name", ["qwen2, tied", "gemma3, window", "mixtral"])
def test_a_quantized_model_stays_close(tmp_path, name, shape):
    """Tied heads, experts and odd norms too, in both forms: logits near the exact ones, and not the same."""
    changes = {} if name == "mixtral" and shape else shape
    tiny_models.save(tmp_path, name, **changes)
    tokens = [(5 * at * at + 7) % 97 for at in range(24)]
    exact = tiny_models.logits_of(tmp_path, tokens, lambda model: model.pack())
    rounded = tiny_models.logits_of(tmp_path, tokens, lambda model: model.pack("int8"))
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
