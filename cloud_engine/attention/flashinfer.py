"""Attention by FlashInfer (an optional library, CUDA only) for steps that compute prompts; decodes are left to another.

FlashInfer plans a step once on the host and then runs each layer. It is told of pages as rows of a sparse matrix (CSR):
`indptr` says where in `indices` the blocks of each sequence begin and end, and how full its last block is. A planned
step cannot be recorded in a CUDA graph and replayed for other lengths, hence the other attention for decodes, whose
launch does not depend on lengths.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cloud_engine.attention.batch import UNLIMITED, Attention, AttentionBatch, Packed, write
from cloud_engine.staging import stage

WORKSPACE_BYTES = 128 << 20
"""For partial results, as its documentation recommends."""


@dataclass(frozen=True, slots=True)
class Pages:
    """The step's sequences as FlashInfer wants them: `rows` and `indptr` [n + 1], `indices` [blocks in use],
    `last` [n], the tokens in each last block, 1 to block_size."""

    rows: list[int]
    indptr: list[int]
    indices: list[int]
    last: list[int]


def pages(sequences: Sequence[tuple[int, int, Sequence[int]]], block_size: int) -> Pages:
    """Of sequences given as in `batch.pack`: count of new rows, context, block table."""
    tables = [table[: -(-context // block_size)] for _, context, table in sequences]
    return Pages(
        rows=list(accumulate((count for count, _, _ in sequences), initial=0)),
        indptr=list(accumulate(map(len, tables), initial=0)),
        indices=[block for table in tables for block in table],
        last=[(context - 1) % block_size + 1 for _, context, _ in sequences],
    )


class FlashInferAttention:
    """See `cloud_engine.attention.batch` for what a call takes. `make` gives FlashInfer's wrapper for prefills: one for
    each window, since layers with the same share a plan. `fence` marks a place in the device's queue, and gives what
    waits for it. Steps of single rows go to `decode`."""

    def __init__(
        self,
        decode: Attention,
        make: Callable[[], Any],
        fence: Callable[[], Callable[[], object]],
    ) -> None:
        self._decode, self._make, self._fence = decode, make, fence
        self._planned: dict[int, _Planned] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, batch: AttentionBatch, /) -> Tensor:
        packed = batch.packed
        if packed is None or packed.longest_chunk == 1:
            return self._decode(q, k, v, cache, batch)
        write(k, v, cache, batch.slots)
        planned = self._planned.get(packed.window)
        if planned is None:
            planned = self._planned[packed.window] = _Planned(self._make(), self._fence)
        wrapper = planned.for_step(packed, q, cache)
        result: Tensor = wrapper.run(q, (cache[0], cache[1]))
        return result


class _Planned:
    """A wrapper and the step it was planned for."""

    def __init__(self, wrapper: Any, fence: Callable[[], Callable[[], object]]) -> None:
        self._wrapper, self._fence = wrapper, fence
        self._step: Packed | None = None
        self._copied: Callable[[], object] = lambda: None

    def for_step(self, packed: Packed, q: Tensor, cache: Tensor) -> Any:
        """The wrapper, planned for this step. Its plan goes to the device from pinned memory that the next plan writes
        again: that waits until the copy is done, which it is long before, unless steps are launched ahead."""
        if packed is self._step:
            return self._wrapper
        self._copied()
        told = pages(packed.sequences, cache.shape[2])
        self._wrapper.plan(
            *(torch.tensor(values, dtype=torch.int32) for values in (told.rows, told.indptr)),
            stage(told.indices, torch.int32, q.device),
            torch.tensor(told.last, dtype=torch.int32),
            q.shape[1],
            cache.shape[3],
            q.shape[2],
            cache.shape[2],
            causal=True,
            window_left=-1 if packed.window == UNLIMITED else packed.window - 1,
            q_data_type=q.dtype,
            kv_data_type=cache.dtype,
        )
        self._copied, self._step = self._fence(), packed
        return self._wrapper


def load(decode: Attention, device: torch.device) -> FlashInferAttention:
    """Raises ImportError where FlashInfer is not installed."""
    library = importlib.import_module("flashinfer")
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def fence() -> Callable[[], object]:
        wait: Callable[[], object] = torch.cuda.current_stream(device).record_event().synchronize
        return wait

    return FlashInferAttention(decode, lambda: library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD"), fence)
