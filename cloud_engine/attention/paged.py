"""Paged attention on torch's fused scaled-dot-product kernels: the fast path on a CPU, a correct one on a GPU.

A sequence alone reads its own blocks: without a copy where they are consecutive, by one `index_select` along the blocks
otherwise. Many decoding sequences of similar length are gathered into one padded batch, which spares a call for each.
An FP8 cache is converted as it is read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cloud_engine.attention.batch import AttentionBatch, Decodes, Span, write


def attend(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, batch: AttentionBatch) -> Tensor:
    """See `cloud_engine.attention.batch` for shapes and the promise to write before reading."""
    write(k, v, cache, batch.slots)
    out = torch.empty_like(q)
    for span in batch.spans:
        if span.count == 1:
            _decode(q, cache, span, out)
        else:
            _prefill(q, k, v, cache, span, out)
    for group in batch.decodes:
        out[group.rows] = _decode_group(q, cache, group)
    return out


def _read(cache: Tensor, span: Span, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence's context, each [1, Hkv, context, D]."""
    blocks = cache[:, span.blocks] if isinstance(span.blocks, slice) else cache.index_select(1, span.blocks)
    kv = blocks.flatten(1, 2)[:, None, : span.context].to(dtype).transpose(2, 3)
    return kv[0], kv[1]


def _decode(q: Tensor, cache: Tensor, span: Span, out: Tensor) -> None:
    """All query heads of a group see the same keys, so they can be rows of one problem: [1, Hkv, group, D]."""
    keys, values = _read(cache, span, q.dtype)
    heads = keys.shape[1]
    query = q[span.row].view(1, heads, -1, q.shape[2])
    out[span.row] = F.scaled_dot_product_attention(query, keys, values, attn_mask=span.mask).view(q.shape[1:])


def _prefill(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, span: Span, out: Tensor) -> None:
    """With history the mask is explicit: `is_causal` aligns to the first key, wrong where keys outnumber rows."""
    rows = slice(span.row, span.row + span.count)
    query = q[rows].transpose(0, 1)[None]
    if span.mask is None and cache.dtype is k.dtype:
        keys, values = k[rows].transpose(0, 1)[None], v[rows].transpose(0, 1)[None]
    else:
        keys, values = _read(cache, span, q.dtype)
    result = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=span.mask, is_causal=span.mask is None, enable_gqa=True
    )
    out[rows] = result[0].transpose(0, 1)


def _decode_group(q: Tensor, cache: Tensor, group: Decodes) -> Tensor:
    """Like `_decode`, for a batch padded to one length."""
    count, width = group.tables.shape
    kv = cache.index_select(1, group.tables.flatten()).flatten(1, 2).to(q.dtype)
    # A stale slot may hold anything, and 0 * NaN is NaN: masking the scores would not do.
    kv.index_fill_(1, group.stale, 0)
    keys, values = kv.view(2, count, width * cache.shape[2], *cache.shape[3:]).transpose(2, 3)
    query = q[group.rows].view(count, keys.shape[1], -1, q.shape[2])
    mask = group.mask.expand(-1, keys.shape[1], query.shape[2], -1)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask).view(count, *q.shape[1:])
