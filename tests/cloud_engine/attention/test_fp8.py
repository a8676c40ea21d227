import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.attention import paged, reference, select
from cloud_engine.attention.batch import FP8, FP8_MAX, AttentionBatch, Kernel, decodes, pack, span, write
from cloud_engine.attention.fp8 import HEADROOM, Scaled, scale_for

CPU = torch.device("cpu")
BLOCK, HEADS, KV_HEADS, DIM = 4, 6, 2, 16
SEQUENCES = [(1, 9, [3, 9, 1]), (5, 14, [7, 2, 30, 4]), (4, 4, [5]), (1, 7, [10, 11]), (1, 8, [21, 20])]


def kept(numbers: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """What an FP8 cache gives back for these numbers, each a key."""
    cache = torch.zeros(2, 1, len(numbers), 1, 1, dtype=FP8)
    rows = (numbers / scale)[:, None, None]
    write(rows, rows, cache, torch.arange(len(numbers)))
    assert torch.equal(*cache.view(torch.uint8))
    return cache[0].flatten().float() * scale


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=50))
def test_a_number_keeps_its_first_four_bits(numbers):
    """Within the range that calibration saw, twice over, a number comes back within 1/16 of itself, or, next to zero,
    within half the smallest step."""
    values = torch.tensor(numbers)
    scale = scale_for(values.abs().max().item() / HEADROOM)
    error = (kept(values, scale) - values).abs()
    assert (error <= torch.maximum(values.abs() / 16, torch.tensor(scale * 2.0**-10))).all()


def test_numbers_out_of_range_are_clipped_and_nan_stays():
    """Nothing large turns into NaN, and NaN into nothing else: a poisoned request is still noticed."""
    values = torch.tensor([1e30, -1e30, math.inf, -math.inf, 449.0, math.nan])
    expected = torch.tensor([FP8_MAX, -FP8_MAX, FP8_MAX, -FP8_MAX, FP8_MAX, math.nan])
    torch.testing.assert_close(kept(values), expected, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("largest", [1e-8, 0.3, 1.0, 224.0, 225.0, 1e6])
def test_a_scale_is_the_least_power_of_two_with_headroom(largest):
    """Twice the largest number seen still fits, and half the scale would clip it."""
    scale = scale_for(largest)
    assert math.frexp(scale)[0] == 0.5
    assert scale * FP8_MAX / 2 < largest * HEADROOM <= scale * FP8_MAX


def test_scales_of_nothing_and_of_nonsense():
    """Zeros need no scale; infinite or undefined numbers have none."""
    assert scale_for(0.0) == 1.0
    for largest in (math.inf, math.nan):
        with pytest.raises(ValueError, match="largest"):
            scale_for(largest)


def tensors(dtype=torch.float32):
    noise = torch.Generator().manual_seed(2)
    rows = sum(count for count, _, _ in SEQUENCES)
    q, k, v = (torch.randn(rows, heads, DIM, generator=noise).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache = torch.randn(2, 40, BLOCK, KV_HEADS, DIM, generator=noise).to(FP8)
    for _, context, table in SEQUENCES:
        cache[:, table[-1], (context - 1) % BLOCK + 1 :] = torch.nan
    return q, k, v, cache


def batch(*, grouped=False, scales=(1.0, 1.0)):
    slots, spans, single = [], [], []
    for count, context, table in SEQUENCES:
        if grouped and count == 1:
            single.append((len(slots), context, table))
        else:
            spans.append(span(len(slots), count, context, table, BLOCK, CPU))
        slots += [table[at // BLOCK] * BLOCK + at % BLOCK for at in range(context - count, context)]
    groups = (decodes(single, BLOCK, torch.empty(0)),) if single else ()
    packed = pack(SEQUENCES, BLOCK, CPU)
    return AttentionBatch(torch.tensor(slots), tuple(spans), groups, packed=packed, scales=scales)


def dequantised(q, k, v, cache):
    """The definition, in float32, over the numbers that the FP8 cache holds, converted beforehand."""
    k, v = (x.float().clamp(-FP8_MAX, FP8_MAX).to(FP8).float() for x in (k, v))
    return reference.attend(q.float(), k, v, cache.float(), batch())


def kernel(name):
    if name == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("tested with Triton's interpreter")
        return pytest.importorskip("cloud_engine.attention.triton_unified", reason="Linux only").TritonAttention(0)
    return {"reference": reference.attend, "paged": paged.attend}[name]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["reference", "paged", "triton"])
def test_kernels_read_and_write_an_fp8_cache(name, grouped):
    """Chunks, decodes, whole prompts: each gives what attention over the converted numbers gives, and writes the
    same bytes; unused slots hold NaN."""
    q, k, v, cache = tensors()
    expected = dequantised(q, k, v, cache)
    actual = kernel(name)(q, k, v, cache, batch(grouped=grouped))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    wanted = k.to(FP8).float()
    assert torch.equal(cache[0].flatten(0, 1)[batch().slots].float(), wanted)


@pytest.mark.parametrize("name", ["reference", "paged", "triton"])
def test_scales_cancel_out(name):
    """Keys and values of any magnitude give the same result as those of unit size, exactly (powers of two)."""
    q, k, v, cache = tensors()
    expected = kernel(name)(q, k, v, cache.clone(), batch())
    actual = Scaled(kernel(name))(q / 64, k * 64, v / 1024, cache, batch(scales=(64.0, 2.0**-10)))
    torch.testing.assert_close(actual, expected / 1024, atol=0, rtol=0)


def test_selection_tries_the_kernel_on_an_fp8_cache():
    """One that is right for full precision and fails over an FP8 cache is not chosen for it."""

    def full_only(q, k, v, cache, batch):
        if cache.dtype is FP8:
            raise TypeError("no 8-bit floats")
        return paged.attend(q, k, v, cache, batch)

    shapes = [
        select.Shape(heads=6, kv_heads=2, head_dim=16, block_size=4, dtype=torch.float32, device=CPU, cache=cache)
        for cache in (torch.float32, FP8)
    ]
    load = lambda device: Kernel("full only", full_only)  # noqa: E731
    assert [select.select(shape, load).name for shape in shapes] == ["full only", "paged"]
    select.check(Kernel("paged", paged.attend), shapes[1])
