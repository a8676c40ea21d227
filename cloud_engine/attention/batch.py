"""What every attention kernel is told about a step, and the one signature they share.

A kernel gets this layer's queries [T, Hq, D], keys and values [T, Hkv, D] of the step's T new tokens, and the layer's
cache [2, num_blocks, block_size, Hkv, D]. It first writes all keys and values to their slots and only then reads any,
since sequences of one step may share blocks; it returns [T, Hq, D].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence: rows `row` to `row + count` of the step, the last `count` of its `context` tokens.

    `blocks` is the part of the block table that covers the context: a slice where the blocks are consecutive (no copy
    is needed to read them), else their indices. `mask` [count, context] says which keys each row may see; None where
    plain causality from the first token, or a single row that sees all, needs no mask.
    """

    row: int
    count: int
    context: int
    blocks: slice | Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Decodes:
    """All sequences with one new token: rows [n], tables [n, blocks] padded with the null
    block, mask [n, 1, 1, keys]."""

    rows: Tensor
    tables: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step. `slots` [T] is where each new token's key and value go (int64: slot times stride exceeds 32 bits on
    large pools). `spans` hold every sequence that is not in `decodes`, which is None where a loop is faster."""

    slots: Tensor
    spans: tuple[Span, ...]
    decodes: Decodes | None = None


class Attention(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, batch: AttentionBatch, /) -> Tensor: ...


def write(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Put the step's keys and values into their slots. Raises IndexError for a slot outside the cache."""
    flat = cache.view(2, -1, *cache.shape[3:])
    flat[0].index_copy_(0, slots, k)
    flat[1].index_copy_(0, slots, v)


def span(row: int, count: int, context: int, table: Sequence[int], block_size: int, device: torch.device) -> Span:
    used = table[: -(-context // block_size)]
    mask = None
    if 1 < count < context:
        mask = torch.ones(count, context, dtype=torch.bool, device=device).tril_(context - count)
    return Span(row, count, context, _compact(used, device), mask)


def decodes(spans: Sequence[tuple[int, int, Sequence[int]]], block_size: int, device: torch.device) -> Decodes:
    """Batch single-token sequences, each given as (row, context, block table)."""
    width = max(-(-context // block_size) for _, context, _ in spans)
    tables = torch.zeros(len(spans), width, dtype=torch.int64)
    for index, (_, context, table) in enumerate(spans):
        used = -(-context // block_size)
        tables[index, :used] = torch.as_tensor(table[:used])
    contexts = torch.tensor([context for _, context, _ in spans])
    mask = torch.arange(width * block_size)[None, :] < contexts[:, None]
    rows = torch.tensor([row for row, _, _ in spans])
    return Decodes(rows.to(device), tables.to(device), mask[:, None, None, :].to(device))


def _compact(blocks: Sequence[int], device: torch.device) -> slice | Tensor:
    first, count = blocks[0], len(blocks)
    if blocks[-1] - first == count - 1 and all(blocks[i] == first + i for i in range(count)):
        return slice(first, first + count)
    return torch.tensor(blocks, dtype=torch.int64, device=device)
