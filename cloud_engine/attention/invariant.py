"""Attention whose result for a row depends on that row's own past alone, to the last bit.

Sums of floats depend on their order, and kernels choose it by the shape of a problem: by how many rows a sequence
computes at once, how long its context is, who else is in the batch. Here the position of a row fixes the shape of the
problem that computes it: the `ROWS` queries around it that begin at a multiple of `ROWS`, and all keys up to the last
of these. Queries that are not computed now are zeros, and so are keys that are not written yet: nobody sees them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cloud_engine.attention.batch import NULL, AttentionBatch, Kernel, Tile, write

ROWS = 16
"""Queries of a problem. A sequence that decodes computes all of them for one."""


def tiles(
    row: int,
    start: int,
    end: int,
    table: Sequence[int],
    block_size: int,
    device: torch.device,
    window: int | None = None,
) -> list[Tile]:
    """The problems of a sequence's tokens from `start` to `end`, which are the rows from `row` on."""
    made = []
    for base in range(start - start % ROWS, end, ROWS):
        first, last = max(start, base), min(end, base + ROWS)
        begin = 0 if window is None else max(0, base + 1 - window) // block_size
        blocks = range(begin, -(-(base + ROWS) // block_size))
        keys = torch.arange(begin * block_size, blocks.stop * block_size)
        queries = torch.arange(base, base + ROWS)[:, None]
        mask = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
        held = torch.tensor([table[index] if index < len(table) else NULL for index in blocks])
        rows = slice(row + first - start, row + last - start)
        place = slice(first - base, last - base)
        made.append(Tile(rows, place, held.to(device), last - begin * block_size, mask.to(device)))
    return made


def attend(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, batch: AttentionBatch) -> Tensor:
    """See `cloud_engine.attention.batch` for shapes and the promise to write before reading."""
    write(k, v, cache, batch.slots)
    out = torch.zeros_like(q)
    for tile in batch.tiles:
        kv = cache.index_select(1, tile.blocks).flatten(1, 2).to(q.dtype)
        kv[:, tile.written :] = 0
        keys, values = kv.transpose(1, 2)[:, None]
        query = q.new_zeros(1, q.shape[1], ROWS, q.shape[2])
        query[0, :, tile.place] = q[tile.rows].transpose(0, 1)
        result = F.scaled_dot_product_attention(query, keys, values, attn_mask=tile.mask, enable_gqa=True)
        out[tile.rows] = result[0, :, tile.place].transpose(0, 1)
    return out


INVARIANT = Kernel("invariant", attend)
