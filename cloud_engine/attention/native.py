"""The C++ kernel of `cloud_engine/native/attention.cpp`: the fast path on a CPU."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from cloud_engine.attention.batch import AttentionBatch
from cloud_engine.native.library import NativeUnavailable, library, threads

LANES = 16
"""Head dimensions are multiples of this."""

_ARGUMENTS: list[Any] = [
    *[ctypes.c_void_p] * 9,
    *[ctypes.c_int64] * 4,
    *[ctypes.c_int] * 8,
    ctypes.c_float,
    ctypes.c_int,
]


class NativeAttention:
    """See `cloud_engine.attention.batch`: reads `packed`. Raises NativeUnavailable for a dtype or head dimension that
    the kernel does not have."""

    def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
        names = {torch.float32: "attention_float32", torch.bfloat16: "attention_bfloat16"}
        if dtype not in names or head_dim % LANES:
            raise NativeUnavailable(f"not for {dtype} and heads of {head_dim}")
        self._run = library()[names[dtype]]
        self._run.argtypes, self._run.restype = _ARGUMENTS, ctypes.c_int
        self.dtype = dtype

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, batch: AttentionBatch) -> Tensor:
        packed, known = batch.packed, q.dtype == k.dtype == v.dtype == cache.dtype == self.dtype
        if packed is None or not known or not cache.is_contiguous():
            raise ValueError(f"the kernel takes a packed step in {self.dtype}")
        q, k, v = _rows(q), _rows(k), _rows(v)
        out = q.new_empty(q.shape)
        _, blocks, size, kv_heads, dim = cache.shape
        sequences, width = packed.tables.shape
        failed = self._run(
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), cache.data_ptr(), out.data_ptr(), batch.slots.data_ptr()),
            *(packed.starts.data_ptr(), packed.contexts.data_ptr(), packed.tables.data_ptr()),
            *(q.stride(0), k.stride(0), v.stride(0), blocks * size),
            *(sequences, width, *q.shape[:2], kv_heads, dim, size, packed.window),
            *(dim**-0.5, threads()),
        )
        if failed:
            raise IndexError("a slot is outside the cache")
        return out


def _rows(part: Tensor) -> Tensor:
    """[T, heads, D] with the heads of a row side by side; rows may lie apart."""
    return part if part.stride()[1:] == (part.shape[2], 1) else part.contiguous()
