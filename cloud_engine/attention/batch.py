"""What every attention kernel is told about a step, and the one signature they share.

A kernel gets this layer's queries [T, Hq, D], keys and values [T, Hkv, D] of the step's T new tokens, and the layer's
cache [2, num_blocks, block_size, Hkv, D]. It first writes all keys and values to their slots and only then reads any,
since sequences of one step may share blocks; it returns [T, Hq, D].

In layers with a sliding window a token sees the last `window` tokens only, itself among them. To such a layer a long
sequence is a short one: blocks that none of its new tokens can see are left out of the table, and of the context.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cloud_engine.staging import stage


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence: rows `row` to `row + count` of the step, the last `count` of its `context` tokens.

    `blocks` is the part of the block table that covers the context: a slice where the blocks are consecutive (no copy
    is needed to read them), else their indices. `mask` [count, context] says which keys each row may see; None where
    plain causality from the first key, or a single row that sees all, needs no mask.
    """

    row: int
    count: int
    context: int
    blocks: slice | Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences of similar length with one new token each, as one batch: rows [n], tables [n, width] padded with the
    null block, `contexts` their lengths. `mask` [n, 1, 1, width * block_size] is added to the scores. `stale` lists, of
    the n * width * block_size gathered slots, those of a last block that its sequence has not written."""

    rows: Tensor
    tables: Tensor
    contexts: tuple[int, ...]
    mask: Tensor
    stale: Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """All sequences of a step as three tensors (int32), for a kernel that takes the step in one launch. Sequence i has
    the rows `starts[i]` to `starts[i + 1]`, the last of its `contexts[i]` tokens, in the blocks `tables[i]` [width].
    A token sees the last `window` tokens only, itself among them. The host's `rows`, `longest_chunk` and
    `longest_context` spare a kernel from asking the device."""

    starts: Tensor
    contexts: Tensor
    tables: Tensor
    rows: int
    longest_chunk: int
    longest_context: int
    window: int
    sequences: Sequence[tuple[int, int, Sequence[int]]] = ()
    """What it was packed from, for a kernel that plans on the host; none where a launch must not depend on it."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of one sequence at their `place` among the queries of a problem: see `cloud_engine.attention.invariant`. Its
    keys are in `blocks`, of which the first `written` are; `mask` [queries, keys] says which each query may see."""

    rows: slice
    place: slice
    blocks: Tensor
    written: int
    mask: Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step. `slots` [T] is where each new token's key and value go (int64: slot times stride exceeds 32 bits on
    large pools). Every sequence is either one of `spans` or in one of `decodes`; or all are in `packed`, which is what
    a kernel with `Kernel.packed` reads, and the others need not be made; or in `tiles`, for the invariant kernel. The
    masks of spans, decodes and tiles, and `packed`, already keep to `window`; it is None where a token sees all before
    it. `scales` are what keys and values are divided by in an FP8 cache: kernels need not look at them, see
    `cloud_engine.attention.fp8`."""

    slots: Tensor
    spans: tuple[Span, ...] = ()
    decodes: tuple[Decodes, ...] = ()
    window: int | None = None
    packed: Packed | None = None
    tiles: tuple[Tile, ...] = ()
    scales: tuple[float, float] = (1.0, 1.0)


NULL = 0
"""The block that padding points at: finite numbers, and nobody's."""


FP8 = torch.float8_e4m3fn
"""What a cache of 8-bit floats holds: 4 bits of exponent, 3 of mantissa. A kernel converts what it reads to the
dtype of its queries."""
FP8_MAX = 448.0


UNLIMITED = 2**31 - 1
"""The window of a layer without one: an int32 from which any position can be taken."""


class Attention(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, batch: AttentionBatch, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernel:
    """An attention and what it wants to be told: `AttentionBatch.packed` only, or spans and decodes."""

    name: str
    attend: Attention
    packed: bool = False


def write(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Put the step's keys and values into their slots. Raises IndexError for a slot outside the cache."""
    flat = cache.view(2, -1, *cache.shape[3:])
    if cache.dtype is FP8:
        # As bytes: on a CPU there is no index_copy_ of 8-bit floats. NaN stays NaN, all else is kept in range.
        k, v = (x.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8) for x in (k, v))
        flat = flat.view(torch.uint8)
    flat[0].index_copy_(0, slots, k)
    flat[1].index_copy_(0, slots, v)


def first_block(context: int, count: int, block_size: int, window: int | None) -> int:
    """Of a sequence's blocks, the first that one of its last `count` tokens can see."""
    return 0 if window is None else max(0, context - count + 1 - window) // block_size


def span(
    row: int,
    count: int,
    context: int,
    table: Sequence[int],
    block_size: int,
    device: torch.device,
    window: int | None = None,
) -> Span:
    first = first_block(context, count, block_size, window)
    used = table[first : -(-context // block_size)]
    context -= first * block_size
    hidden = window is not None and window < context
    mask = None
    if hidden or 1 < count < context:
        mask = torch.ones(count, context, dtype=torch.bool, device=device).tril_(context - count)
    if mask is not None and window is not None:
        mask.triu_(context - count + 1 - window)
    return Span(row, count, context, _compact(used, device), mask)


def decodes(
    rows: Sequence[tuple[int, int, Sequence[int]]], block_size: int, like: Tensor, window: int | None = None
) -> Decodes:
    """Batch single-token sequences, each given as (row, context, block table); tensors are made like `like`."""
    firsts = [first_block(context, 1, block_size, window) for _, context, _ in rows]
    contexts = tuple(context - first * block_size for (_, context, _), first in zip(rows, firsts, strict=True))
    used = [table[first : -(-context // block_size)] for (_, context, table), first in zip(rows, firsts, strict=True)]
    width = max(map(len, used))
    tables = [[*blocks, *[NULL] * (width - len(blocks))] for blocks in used]
    keys, lengths = torch.arange(width * block_size), torch.tensor(contexts)[:, None]
    written = -(-lengths // block_size) * block_size
    unseen = keys >= lengths
    stale = (unseen & (keys < written)).flatten().nonzero()[:, 0]
    if window is not None:
        unseen = unseen | (keys < lengths - window)
    mask = torch.zeros(len(rows), 1, 1, width * block_size, dtype=like.dtype)
    mask.masked_fill_(unseen[:, None, None], -torch.inf)
    rows_at = torch.tensor([row for row, _, _ in rows])
    on = like.device
    return Decodes(rows_at.to(on), torch.tensor(tables).to(on), contexts, mask.to(on), stale.to(on))


def pack(
    sequences: Sequence[tuple[int, int, Sequence[int]]],
    block_size: int,
    device: torch.device,
    window: int = UNLIMITED,
) -> Packed:
    """Pack sequences, given as (count of new rows, context, block table) in the order of their rows."""
    counts = [count for count, _, _ in sequences]
    contexts = [context for _, context, _ in sequences]
    width = max(-(-context // block_size) for context in contexts)
    tables = [[*table[: -(-context // block_size)], *[NULL] * width][:width] for _, context, table in sequences]
    starts = list(itertools.accumulate(counts, initial=0))
    integers = stage(starts + contexts, torch.int32, device)
    on_starts, on_contexts = integers.split_with_sizes([len(starts), len(contexts)])
    on_tables = stage(tables, torch.int32, device)
    return Packed(on_starts, on_contexts, on_tables, starts[-1], max(counts), max(contexts), window, sequences)


def _compact(blocks: Sequence[int], device: torch.device) -> slice | Tensor:
    first, count = blocks[0], len(blocks)
    if blocks[-1] - first == count - 1 and all(blocks[i] == first + i for i in range(count)):
        return slice(first, first + count)
    return torch.tensor(blocks, dtype=torch.int64, device=device)
