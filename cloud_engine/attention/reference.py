"""Paged attention as the definition says: slow, plain, in float32. The oracle of every fast kernel."""

import math

import torch
from torch import Tensor

from cloud_engine.attention.batch import AttentionBatch, Span, write


def attend(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, batch: AttentionBatch) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over each token's own past, one sequence, head and row at a time."""
    write(k, v, cache, batch.slots)
    out = torch.zeros_like(q)
    for span in _all_spans(batch, cache):
        keys, values = _gather(cache, span)
        group = q.shape[1] // keys.shape[1]
        for offset in range(span.count):
            end = span.context - span.count + offset + 1
            visible = slice(0 if batch.window is None else max(0, end - batch.window), end)
            for head in range(q.shape[1]):
                key, value = keys[visible, head // group].float(), values[visible, head // group].float()
                scores = key @ q[span.row + offset, head].float() / math.sqrt(q.shape[2])
                out[span.row + offset, head] = (scores.softmax(0) @ value).to(q.dtype)
    return out


def _all_spans(batch: AttentionBatch, cache: Tensor) -> list[Span]:
    spans = list(batch.spans)
    for group in batch.decodes:
        for row, table, length in zip(group.rows.tolist(), group.tables, group.contexts, strict=True):
            spans.append(Span(row, 1, length, table[: -(-length // cache.shape[2])], None))
    return spans


def _gather(cache: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    blocks = range(span.blocks.start, span.blocks.stop) if isinstance(span.blocks, slice) else span.blocks.tolist()
    size = cache.shape[2]
    slots = [(blocks[position // size], position % size) for position in range(span.context)]
    keys = torch.stack([cache[0, block, offset] for block, offset in slots])
    values = torch.stack([cache[1, block, offset] for block, offset in slots])
    return keys, values
