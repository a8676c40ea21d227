"""Weights in the orders of memory, and of numbers, that a processor multiplies fastest. `pack` chooses.

- float32 on a CPU with AVX512, bfloat16 on one with AVX512-BF16: panels for `native/matmul.cpp` (`Panels`).
- float32 on another CPU: oneDNN's own blocks (`Reordered`), 1.2 to 2 times faster than a plain weight for few rows.
- int8: values of -127 to 127 with a scale for each group of 64 inputs of an output. On a CPU with AVX512-VNNI the rows
  of x are rounded in the same way, group by group (`Int8Panels`, `native/matmul_int8.cpp`); elsewhere, a GPU included,
  only the weight is rounded, and turned back for each product (`Int8`).
"""

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cloud_engine.engine.config import Quantization
from cloud_engine.native.library import BFLOAT16, FLOAT32, INT8, features, library, threads

LANES = 16
"""Numbers of a vector; a norm's inputs are multiples of this."""
PANEL = 2 * LANES
"""Outputs of a panel."""
GROUP = 64
"""Inputs with a scale in common; the greatest divisor of both where the inputs are no multiple."""

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_PRODUCT: list[Any] = [
    *[_POINTER, _LONG, _INT, _INT],
    *[_POINTER, _FLOAT, _POINTER, _POINTER, _LONG],
    *[_POINTER, _INT, _INT, _INT],
    _POINTER,
]
"""The members of `Product` in `native/product.h`, and the weight."""


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


class RowNorm(Protocol):
    """Divides each row by its root mean square (`eps` added to its square), then multiplies by the weight [inputs]."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def eps(self) -> float: ...

    def __call__(self, x: Tensor, /) -> Tensor: ...


def pack(
    weight: Tensor, bias: Tensor | None, quantization: Quantization = "none", *, gated: bool = False
) -> Packed | None:
    """The best order for `weight` [outputs, inputs] here; None if that is the one it has. A `gated` one may apply the
    gate itself: see `Surrounded`."""
    if not weight.numel():
        return None
    if quantization == "int8" and not _fits_int8(weight):
        return Int8(*quantize(weight), bias)
    if quantization == "int8":
        return Int8Panels(weight, bias, gated=gated)
    if weight.device.type != "cpu":
        return None
    kind = _KINDS.get(weight.dtype)
    if kind is not None and weight.shape[1] % kind.neighbours == 0 and features() & kind.feature:
        return Panels(weight, bias, kind, gated=gated)
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


class Int8:
    """The weight alone is rounded."""

    def __init__(self, values: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self.values, self.scales, self.bias = values, scales, bias

    def __call__(self, x: Tensor) -> Tensor:
        groups = self.values.view(*self.scales.shape, -1).to(x.dtype) * self.scales.to(x.dtype)[..., None]
        return F.linear(x, groups.view(self.values.shape), self.bias)


class Surrounded:
    """A product with what comes before and after it in one pass: gate(norm(x) * weight + bias) + added.

    Of a weight that is `gated` the first half of the outputs are gates and the second what they let through, times
    silu of the gate: half as many columns come out. One that cannot be divided so says that it is not `gated`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        runs: Mapping[torch.dtype, str],
        order: Callable[[Tensor], Tensor],
        *,
        gated: bool,
    ) -> None:
        """`runs` are the kernels' names; after a product's members they take what `order` makes of the weight."""
        self.outputs, self.inputs = weight.shape
        self.gated = gated and self.outputs % PANEL == 0
        self.columns = self.outputs // 2 if self.gated else self.outputs
        self.bias = None if bias is None else _padded(self._paired(bias)).float().contiguous()
        self.weight = order(self._paired(weight))
        self._runs = {dtype: library()[name] for dtype, name in runs.items()}
        for run in self._runs.values():
            run.argtypes, run.restype = _PRODUCT, None

    def __call__(self, x: Tensor, norm: RowNorm | None = None, added: Tensor | None = None) -> Tensor:
        """[rows, columns], of x's type as is `added` [rows, columns]."""
        if norm is not None and (norm.weight.dtype != x.dtype or self.inputs % LANES):
            x, norm = norm(x), None
        x = _rows(x, self.inputs)
        added = added if added is None else _rows(added, self.columns, x)
        rows = x.shape[0]
        out = x.new_empty(rows, self.columns)
        self._runs[x.dtype](
            *(x.data_ptr(), x.stride(0), rows, self.inputs),
            *((None, 0.0) if norm is None else (norm.weight.data_ptr(), norm.eps)),
            None if self.bias is None else self.bias.data_ptr(),
            *((None, 0) if added is None else (added.data_ptr(), added.stride(0))),
            *(out.data_ptr(), self.outputs, self.gated, threads(), self.weight.data_ptr()),
        )
        return out

    def _paired(self, weight: Tensor) -> Tensor:
        """Rows in the order of panels: if it is gated, sixteen gates before the sixteen that belong to them."""
        if not self.gated:
            return weight
        halves = weight.view(2, -1, LANES, *weight.shape[1:])
        return halves.transpose(0, 1).reshape(weight.shape)


class Panels(Surrounded):
    """Sums are float32; in bfloat16, of pairs of products."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Kind, *, gated: bool = False) -> None:
        order = partial(_panels, neighbours=kind.neighbours)
        super().__init__(weight, bias, {weight.dtype: f"matmul_{kind.name}"}, order, gated=gated)


class Int8Panels(Surrounded):
    """Both factors are rounded; sums of a group are exact, sums of groups float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> None:
        runs = {torch.float32: "matmul_int8_float32", torch.bfloat16: "matmul_int8_bfloat16"}
        super().__init__(weight, bias, runs, _groups, gated=gated)


def _fits_int8(weight: Tensor) -> bool:
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.shape[1] % GROUP == 0
    return known and weight.device.type == "cpu" and bool(features() & INT8)


def _panels(weight: Tensor, neighbours: int) -> Tensor:
    """[outputs, inputs] as [panel][inputs / neighbours][PANEL][neighbours], zeros for outputs that are not there."""
    inputs = weight.shape[1]
    panels = _padded(weight).view(-1, PANEL, inputs // neighbours, neighbours)
    return panels.permute(0, 2, 1, 3).contiguous()


def _groups(weight: Tensor) -> Tensor:
    """[outputs, inputs] rounded: of each panel and group the values plus 128, four inputs together, then the scales."""
    values, scales = quantize(weight)
    values, scales = _panels(values, 4).view(torch.uint8), _panels(scales, 1)
    parts = (part.view(*scales.shape[:2], -1) for part in (values ^ 128, scales))
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1)


def _padded(weight: Tensor) -> Tensor:
    """With as many outputs [outputs, ...] as whole panels have."""
    return F.pad(weight, (*(0, 0) * (weight.ndim - 1), 0, -len(weight) % PANEL))


def _rows(x: Tensor, columns: int, like: Tensor | None = None) -> Tensor:
    """Checked, for the kernel checks nothing; rows may lie apart."""
    if x.ndim != 2 or x.shape[1] != columns or (like is not None and (len(x), x.dtype) != (len(like), like.dtype)):
        raise ValueError(f"a product takes {columns} columns, not {list(x.shape)} of {x.dtype}")
    return x if x.stride(1) == 1 else x.contiguous()
