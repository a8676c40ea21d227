"""Weights in the orders of memory, and of numbers, that a processor multiplies fastest. `pack` chooses.

- float32 on a CPU with AVX512, bfloat16 on one with AVX512-BF16: panels for `native/matmul.cpp` (`Panels`).
- float32 on another CPU: oneDNN's own blocks (`Reordered`), 1.2 to 2 times faster than a plain weight for few rows.
- int8: values of -127 to 127 with a scale for each group of 64 inputs of an output. On a CPU with AVX512-VNNI the rows
  of x are rounded in the same way, group by group (`Int8Panels`); elsewhere, a GPU included, only the weight is
  rounded, and turned back for each product (`Int8`).
"""

import ctypes
import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cloud_engine.engine.config import Quantization
from cloud_engine.native.library import BFLOAT16, FLOAT32, INT8, features, library, threads

PANEL = 32
"""Outputs of a panel."""
GROUP = 64
"""Inputs with a scale in common; the greatest divisor of both where the inputs are no multiple."""

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


@dataclass(frozen=True, slots=True)
class Kind:
    """What `Panels` need to know of a dtype."""

    name: str
    neighbours: int
    feature: int


_KINDS = {torch.float32: Kind("float32", 1, FLOAT32), torch.bfloat16: Kind("bfloat16", 2, BFLOAT16)}


class Packed(Protocol):
    """x [rows, inputs] times the transposed weight, plus the bias: [rows, outputs] of x's type. rows > 0."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


def pack(weight: Tensor, bias: Tensor | None, quantization: Quantization = "none") -> Packed | None:
    """The best order for `weight` [outputs, inputs] here; None if that is the one it has."""
    if not weight.numel():
        return None
    if quantization == "int8":
        values, scales = quantize(weight)
        return (Int8Panels if _fits_int8(weight) else Int8)(values, scales, bias)
    if weight.device.type != "cpu":
        return None
    kind = _KINDS.get(weight.dtype)
    if kind is not None and weight.shape[1] % kind.neighbours == 0 and features() & kind.feature:
        return Panels(weight, bias, kind)
    if weight.dtype == torch.float32 and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return Reordered(weight, bias)
    return None


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values [outputs, inputs] and float32 scales [outputs, groups], the largest of each group being 127."""
    outputs, inputs = weight.shape
    groups = weight.float().view(outputs, -1, math.gcd(inputs, GROUP))
    peaks = groups.abs().amax(-1)
    factors = torch.where(peaks > 0, 127 / peaks, 0.0)
    return (groups * factors[..., None]).round_().to(torch.int8).view(outputs, inputs), peaks / 127


class Reordered:
    """The operators are those that torch's own compiler emits for frozen weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight, None), bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class Panels:
    """Sums are float32; in bfloat16, of pairs of products."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Kind) -> None:
        self.outputs, self.inputs = weight.shape
        self.weight, self.bias = _panels(weight, kind.neighbours), _floats(bias)
        self._run = library()[f"matmul_{kind.name}"]
        self._run.argtypes = [_POINTER, _LONG, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT, _INT]
        self._run.restype = None

    def __call__(self, x: Tensor) -> Tensor:
        x = _rows(x, self.inputs)
        out = x.new_empty(len(x), self.outputs)
        self._run(
            x.data_ptr(),
            x.stride(0),
            len(x),
            self.inputs,
            self.weight.data_ptr(),
            _address(self.bias),
            out.data_ptr(),
            self.outputs,
            threads(),
        )
        return out


class Int8:
    """The weight alone is rounded."""

    def __init__(self, values: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self.values, self.scales, self.bias = values, scales, bias

    def __call__(self, x: Tensor) -> Tensor:
        groups = self.values.view(*self.scales.shape, -1).to(x.dtype) * self.scales.to(x.dtype)[..., None]
        return F.linear(x, groups.view(self.values.shape), self.bias)


class Int8Panels:
    """Both factors are rounded; sums of a group are exact, sums of groups float32."""

    def __init__(self, values: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self.outputs, self.inputs = values.shape
        self.bias = _floats(bias)
        self.weight, self.scales = _panels(values, 4), _panels(scales, 1)
        self.offsets = _panels(values.view(*scales.shape, -1).sum(-1, dtype=torch.int32) * -128, 1)
        runs = {torch.float32: library().matmul_int8_float32, torch.bfloat16: library().matmul_int8_bfloat16}
        for run in runs.values():
            run.argtypes = [_POINTER, _LONG, _INT, _INT, *[_POINTER] * 5, _INT, _POINTER, _POINTER, _INT]
            run.restype = None
        self._runs = runs

    def __call__(self, x: Tensor) -> Tensor:
        x = _rows(x, self.inputs)
        out = x.new_empty(len(x), self.outputs)
        rounded = torch.empty(x.shape, dtype=torch.uint8)
        scales = torch.empty(len(x), self.inputs // GROUP)
        self._runs[x.dtype](
            x.data_ptr(),
            x.stride(0),
            len(x),
            self.inputs,
            self.weight.data_ptr(),
            self.scales.data_ptr(),
            self.offsets.data_ptr(),
            _address(self.bias),
            out.data_ptr(),
            self.outputs,
            rounded.data_ptr(),
            scales.data_ptr(),
            threads(),
        )
        return out


def _fits_int8(weight: Tensor) -> bool:
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.shape[1] % GROUP == 0
    return known and weight.device.type == "cpu" and bool(features() & INT8)


def _panels(weight: Tensor, neighbours: int) -> Tensor:
    """[outputs, inputs] as [panel][inputs / neighbours][PANEL][neighbours], zeros for outputs that are not there."""
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, 0, 0, -outputs % PANEL))
    return padded.view(-1, PANEL, inputs // neighbours, neighbours).permute(0, 2, 1, 3).contiguous()


def _floats(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(x: Tensor, inputs: int) -> Tensor:
    """Checked, for the kernel checks nothing; rows may lie apart."""
    if x.ndim != 2 or x.shape[1] != inputs:
        raise ValueError(f"a product of {list(x.shape)} with {inputs} inputs")
    return x if x.stride(1) == 1 else x.contiguous()
