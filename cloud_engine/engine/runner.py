"""One step on the device: lists become tensors, tensors become logits. Owns the KV tensors."""

import torch
from torch import Tensor

from cloud_engine.attention import paged
from cloud_engine.attention.batch import Attention, AttentionBatch, Kernel, Span, decodes, pack, span
from cloud_engine.attention.select import Shape, select
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.scheduler import Work
from cloud_engine.model.config import ModelConfig
from cloud_engine.model.llama import Llama, rotary_table

MIN_GROUP = 4
"""Decodes fewer than this are cheaper one by one, each reading its blocks in place where they lie together."""


class Runner:
    """Computes a step's tokens and remembers their keys and values, per layer [2, num_blocks, block_size, Hkv, D].
    `packed` says what `attend` reads of a batch, see `cloud_engine.attention.batch.Kernel`."""

    def __init__(
        self, model: Llama, config: EngineConfig, attend: Attention = paged.attend, *, packed: bool = False
    ) -> None:
        self.model, self.config, self.attend, self.packed = model, config, attend, packed
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        shape = (2, config.num_blocks, config.block_size, model.config.num_kv_heads, model.config.head_dim)
        self.caches = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(model.config.num_layers)]
        cos, sin = rotary_table(model.config, config.model_len)
        self.cos, self.sin = (table.to(self.device, self.dtype) for table in (cos, sin))

    def run(self, work: list[Work]) -> Tensor:
        """Logits [n, vocab] of the works that sample, in their order."""
        with torch.inference_mode():
            tokens, positions, rows = _rows(work)
            at = self._tensor(positions)
            rotation = self.cos[at], self.sin[at]
            batch = self._packed(work) if self.packed else self._batch(work)
            logits: Tensor = self.model(
                self._tensor(tokens), rotation, self.attend, self.caches, batch, self._tensor(rows)
            )
            return logits

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device)

    def _packed(self, work: list[Work]) -> AttentionBatch:
        size = self.config.block_size
        sequences = [(item.count, item.start + item.count, item.sequence.block_table) for item in work]
        return AttentionBatch(
            self._tensor([slot for item in work for slot in _slots(item, size)]),
            packed=pack(sequences, size, self.device),
        )

    def _batch(self, work: list[Work]) -> AttentionBatch:
        """Decodes of similar length (within a factor of two) form groups; what is left alone is a span of its own."""
        size = self.config.block_size
        slots: list[int] = []
        spans: list[Span] = []
        single: dict[int, list[tuple[int, int, list[int]]]] = {}
        for item in work:
            table, row, end = item.sequence.block_table, len(slots), item.start + item.count
            slots += _slots(item, size)
            if item.count == 1:
                single.setdefault((-(-end // size) - 1).bit_length(), []).append((row, end, table))
            else:
                spans.append(span(row, item.count, end, table, size, self.device))
        groups = []
        for alike in single.values():
            if len(alike) >= MIN_GROUP:
                groups.append(decodes(alike, size, self.cos))
            else:
                spans += [span(row, 1, end, table, size, self.device) for row, end, table in alike]
        return AttentionBatch(self._tensor(slots), tuple(spans), tuple(groups))


def attention_for(model: ModelConfig, config: EngineConfig) -> Kernel:
    """The attention that serves this model best here. On a GPU it is tried out first, which takes seconds."""
    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    return select(Shape(model.num_heads, model.num_kv_heads, model.head_dim, config.block_size, dtype, device))


def _slots(item: Work, size: int) -> list[int]:
    table = item.sequence.block_table
    return [table[at // size] * size + at % size for at in range(item.start, item.start + item.count)]


def _rows(work: list[Work]) -> tuple[list[int], list[int], list[int]]:
    """Tokens and positions of the step, and the rows whose logits are wanted."""
    tokens: list[int] = []
    positions: list[int] = []
    sampled: list[int] = []
    for item in work:
        end = item.start + item.count
        tokens += item.sequence.tokens[item.start : end]
        positions += range(item.start, end)
        if item.samples:
            sampled.append(len(tokens) - 1)
    return tokens, positions, sampled
