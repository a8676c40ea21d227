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
        packed = batch.packed
        if packed is None or not cache.is_contiguous() or {q.dtype, k.dtype, v.dtype, cache.dtype} != {self.dtype}:
            raise ValueError(f"the kernel takes a packed step in {self.dtype}")
        q, k, v = (part if part.stride()[1:] == (part.shape[2], 1) else part.contiguous() for part in (q, k, v))
        out = q.new_empty(q.shape)
        _, blocks, size, kv_heads, dim = cache.shape
        failed = self._run(
            *(part.data_ptr() for part in (q, k, v, cache, out, batch.slots)),
            *(part.data_ptr() for part in (packed.starts, packed.contexts, packed.tables)),
            *(part.stride(0) for part in (q, k, v)),
            blocks * size,
            len(packed.contexts),
            packed.tables.shape[1],
            len(q),
            q.shape[1],
            kv_heads,
            dim,
            size,
            packed.window,
            dim**-0.5,
            threads(),
        )
        if failed:
            raise IndexError("a slot is outside the cache")
        return out
