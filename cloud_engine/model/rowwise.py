"""What layers do to each row by itself: in one pass by `native/rows.cpp` on a CPU, else by torch's operators.

torch makes several passes of a norm, a gate or a rotation, and in bfloat16 each rounds: for one row that costs as much
as a product with a small matrix.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cloud_engine.native.library import NativeUnavailable, library, threads

LANES = 16
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ARGUMENTS: dict[str, list[Any]] = {
    "norm": [*[_POINTER] * 3, _LONG, _INT, ctypes.c_float, _INT],
    "gate": [*[_POINTER] * 2, _LONG, _INT, _INT],
    "greatest": [*[_POINTER] * 3, _LONG, _INT, _INT],
    "rotate": [_POINTER, _LONG, *[_POINTER] * 3, _LONG, _INT, _INT, _INT],
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, then multiply by the weight [size]."""
    size = len(weight)
    run = _native("norm", x) if size % LANES == 0 and weight.dtype == x.dtype else None
    if run is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    run(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps, threads())
    return out


def silu_gate(x: Tensor) -> Tensor:
    """silu(gate) * up, where x [rows, 2 * size] is gate and up beside each other."""
    rows, size = x.shape[0], x.shape[1] // 2
    run = _native("gate", x) if size % LANES == 0 and x.is_contiguous() else None
    if run is None:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    out = x.new_empty(rows, size)
    run(x.data_ptr(), out.data_ptr(), rows, size, threads())
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of the heads x [T, H, D] by its token's angles, cos and sin [T, 1, D/2]."""
    rows, heads, dim = x.shape
    whole = x.stride()[1:] == (dim, 1) and cos.is_contiguous() and sin.is_contiguous() and cos.dtype == x.dtype
    run = _native("rotate", x) if dim % (2 * LANES) == 0 and whole else None
    if run is None:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    out = x.new_empty(rows, heads, dim)
    parts = (x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    run(*parts, rows, heads, dim // 2, threads())
    return out


def greatest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number (float32) of each row of x [rows, size], and the first place where it is; if a number is NaN,
    that one. torch needs a copy in float32, and then one step a number."""
    run = _native("greatest", x) if x.is_contiguous() and x.shape[1] else None
    if run is None:
        values, places = x.max(dim=-1)
        return values.float(), places
    values, places = torch.empty(len(x)), torch.empty(len(x), dtype=torch.int64)
    run(x.data_ptr(), values.data_ptr(), places.data_ptr(), *x.shape, threads())
    return values, places


def _native(name: str, x: Tensor) -> Callable[..., None] | None:
    return _loaded(name, x.dtype) if x.device.type == "cpu" else None


@functools.cache
def _loaded(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The compiled function, or None where there is none."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        run = library()[f"{name}_{str(dtype).removeprefix('torch.')}"]
    except NativeUnavailable:
        return None
    run.argtypes, run.restype = _ARGUMENTS[name], None
    return run
