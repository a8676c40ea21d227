"""Paged attention as one Triton kernel for CUDA: prefill chunks and decodes of a step in one launch.

A program computes one tile of rows of one sequence for one key head: the query heads that share the key head are rows
of the same problem, so that a key is read once for all of them. It walks over the keys with the online softmax of
FlashAttention (arXiv 2205.14135). A few decoding sequences do not fill a GPU: then several programs share the keys of
each and a second kernel merges what they found (Flash-Decoding, split-KV).

Masked slots are never loaded, so they may hold anything. Indices that are multiplied by a stride of the cache are
int64. Floats are accumulated in float32, and float32 inputs are not rounded to TF32. How many programs share a sequence
depends on the batch: the last bits of a result may too.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cloud_engine.attention.batch import AttentionBatch, Packed, write

DECODE_TILE, PREFILL_TILE = 16, 64
"""Rows of a tile, heads of a group times tokens: 16 is the least a tensor core takes."""
KEY_TILE = 32
MAX_SEGMENTS = 16
SEGMENT_KEYS = 128
"""Fewer keys than this are not worth a program of their own."""


class TritonAttention:
    """The kernel for a device that runs `programs` at once. See `cloud_engine.attention.batch` for what a call takes;
    `batch.packed` must be there. Rows beyond it (padding) come back as zeros. Raises ValueError for shapes it cannot
    compute."""

    def __init__(self, programs: int) -> None:
        self.programs = programs

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, batch: AttentionBatch, /) -> Tensor:
        packed = batch.packed
        if packed is None:
            raise ValueError("the step was not packed")
        if q.stride(2) != 1 or cache.stride(4) != 1 or q.shape[1] % cache.shape[3]:
            raise ValueError("heads must be contiguous, and query heads a multiple of key heads")
        write(k, v, cache, batch.slots)
        make = torch.empty if packed.rows == q.shape[0] else torch.zeros
        out = make(q.shape, dtype=q.dtype, device=q.device)
        segments = self._segments(packed, cache.shape[3])
        if segments == 1:
            _launch(q, cache, packed, out, out, 1)
        else:
            _launch_split(q, cache, packed, out, segments)
        return out

    def _segments(self, packed: Packed, kv_heads: int) -> int:
        """Among how many programs the keys of a sequence are divided: a power of two."""
        if packed.longest_chunk > 1:
            return 1
        idle = self.programs // (len(packed.contexts) * kv_heads)
        useful = packed.longest_context // SEGMENT_KEYS
        return 1 << max(0, min(idle, useful, MAX_SEGMENTS).bit_length() - 1)


def _launch(q: Tensor, cache: Tensor, packed: Packed, out: Tensor, sums: Tensor, segments: int) -> None:
    """Fill `out`; or, with several segments, its partial results [T, Hq, segments, D] and their `sums`
    [2, T, Hq, segments]: the largest score, and the sum of the weights relative to it."""
    kv_heads, sequences = cache.shape[3], len(packed.contexts)
    group = q.shape[1] // kv_heads
    tile = max(DECODE_TILE if packed.longest_chunk == 1 else PREFILL_TILE, triton.next_power_of_2(group))
    tokens = tile // group
    # A sequence's last tile may not be full. This many hold them all; each program finds the sequence it is for.
    grid = (packed.rows // tokens + sequences, kv_heads, segments)
    _attend[grid](
        q, cache, out, sums, packed.starts, packed.contexts, packed.tables,
        sequences, sequences.bit_length(), packed.window, sums.numel() // 2, math.log2(math.e) / math.sqrt(q.shape[2]),
        packed.tables.stride(0), q.stride(0), q.stride(1), *cache.stride()[:4],
        group=group, head_dim=q.shape[2], dim=_padded(q.shape[2]), block_size=cache.shape[2],
        tile=tile, tokens=tokens, key_tile=KEY_TILE, segments=segments,
    )  # fmt: skip


def _launch_split(q: Tensor, cache: Tensor, packed: Packed, out: Tensor, segments: int) -> None:
    rows, heads, size = packed.rows, q.shape[1], q.shape[2]
    parts = torch.empty(rows, heads, segments, size, dtype=torch.float32, device=q.device)
    sums = torch.empty(2, rows, heads, segments, dtype=torch.float32, device=q.device)
    _launch(q, cache, packed, parts, sums, segments)
    _merge[(rows * heads,)](
        parts, sums, out, sums.numel() // 2, head_dim=size, dim=_padded(size), segments=segments
    )  # fmt: skip


def _padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


@triton.jit  # type: ignore[untyped-decorator]
def _sequence_of(
    tile: tl.tensor, starts: tl.tensor, sequences: tl.tensor, halvings: tl.tensor, tokens: tl.constexpr
) -> tl.tensor:
    """The last sequence whose first tile is not after this one: sequence i begins at tile starts[i] // tokens + i."""
    low = 0
    high = sequences
    for _ in range(halvings):
        middle = (low + high) // 2
        before = tl.load(starts + middle) // tokens + middle <= tile
        # `low` itself always qualifies, and ends as the answer when the two meet at a distance of one.
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit  # type: ignore[untyped-decorator]
def _tile_of_cache(
    cache: tl.tensor,
    table: tl.tensor,
    position: tl.tensor,
    present: tl.tensor,
    kv_block: tl.tensor,
    kv_slot: tl.tensor,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    dim: tl.constexpr,
) -> tl.tensor:
    """Where the keys of these positions are [keys, dim], and which of them may be loaded."""
    column = tl.arange(0, dim)
    block = tl.load(table + position // block_size, mask=present, other=0).to(tl.int64)
    at = cache + block * kv_block + (position % block_size) * kv_slot
    return at[:, None] + column[None, :], present[:, None] & (column < head_dim)[None, :]


@triton.jit(do_not_specialize=["sequences", "halvings", "window", "sums_size", "table_stride"])  # type: ignore[untyped-decorator]
def _attend(
    q: tl.tensor,
    cache: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    tables: tl.tensor,
    sequences: tl.tensor,
    halvings: tl.tensor,
    window: tl.tensor,
    sums_size: tl.tensor,
    scale: tl.tensor,
    table_stride: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    kv_part: tl.tensor,
    kv_block: tl.tensor,
    kv_slot: tl.tensor,
    kv_head: tl.tensor,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    dim: tl.constexpr,
    block_size: tl.constexpr,
    tile: tl.constexpr,
    tokens: tl.constexpr,
    key_tile: tl.constexpr,
    segments: tl.constexpr,
) -> None:
    """One tile of rows, one key head, one segment of the keys. `scale` includes log2(e): weights are powers of two."""
    head_of_keys, segment = tl.program_id(1), tl.program_id(2)
    sequence = _sequence_of(tl.program_id(0), starts, sequences, halvings, tokens)
    first, context = tl.load(starts + sequence), tl.load(contexts + sequence)
    count = tl.load(starts + sequence + 1) - first
    begin = (tl.program_id(0) - first // tokens - sequence) * tokens
    if begin >= count:
        return
    lane, column = tl.arange(0, tile), tl.arange(0, dim)
    token, head = begin + lane // group, head_of_keys * group + lane % group
    live = (lane // group < tokens) & (token < count)
    row, wanted = (first + token).to(tl.int64), live[:, None] & (column < head_dim)[None, :]
    query = tl.load(q + (row * q_row + head * q_head)[:, None] + column[None, :], mask=wanted, other=0.0)

    own = context - count + token
    share = tl.cdiv(tl.cdiv(context, key_tile), segments) * key_tile
    start = tl.maximum(segment * share, context - count + begin - window + 1)
    end = tl.minimum((segment + 1) * share, context - count + tl.minimum(begin + tokens, count))
    top = tl.full([tile], float("-inf"), tl.float32)
    total = tl.zeros([tile], tl.float32)
    result = tl.zeros([tile, dim], tl.float32)
    table, keys = tables + sequence.to(tl.int64) * table_stride, cache + head_of_keys * kv_head
    for at_key in range(start, end, key_tile):
        position = at_key + tl.arange(0, key_tile)
        at, present = _tile_of_cache(
            keys, table, position, position < end, kv_block, kv_slot, block_size, head_dim, dim
        )
        key = tl.load(at, mask=present, other=0.0).to(query.dtype)  # an FP8 cache is converted tile by tile
        value = tl.load(at + kv_part, mask=present, other=0.0).to(query.dtype)
        behind = own[:, None] - position[None, :]
        seen = live[:, None] & (position < end)[None, :] & (behind >= 0) & (behind < window)
        score = tl.where(seen, tl.dot(query, tl.trans(key), input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet: inf - inf is NaN
        weight, decay = tl.exp2(score - base[:, None]), tl.exp2(top - base)
        total = total * decay + tl.sum(weight, 1)
        result = tl.dot(weight.to(value.dtype), value, result * decay[:, None], input_precision="ieee")
        top = higher

    cell = (row * (tl.num_programs(1) * group) + head) * segments + segment
    to = out + cell[:, None] * head_dim + column[None, :]
    if segments == 1:
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(to, (result / total[:, None]).to(out.dtype.element_ty), mask=wanted)
    else:
        tl.store(to, result, mask=wanted)
        tl.store(sums + cell, top, mask=live)
        tl.store(sums + sums_size + cell, total, mask=live)


@triton.jit(do_not_specialize=["sums_size"])  # type: ignore[untyped-decorator]
def _merge(
    parts: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    sums_size: tl.tensor,
    head_dim: tl.constexpr,
    dim: tl.constexpr,
    segments: tl.constexpr,
) -> None:
    """One row and head: the segments' results, each weighed by how far its largest score is below the largest."""
    row = tl.program_id(0).to(tl.int64)
    cell, column = row * segments + tl.arange(0, segments), tl.arange(0, dim)
    top, total = tl.load(sums + cell), tl.load(sums + sums_size + cell)
    highest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))  # 0 for a segment that has seen nothing
    wanted = (column < head_dim)[None, :]
    part = tl.load(parts + cell[:, None] * head_dim + column[None, :], mask=wanted, other=0.0)
    whole = tl.sum(weight * total, 0)
    result = tl.sum(part * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + row * head_dim + column, result.to(out.dtype.element_ty), mask=column < head_dim)
