"""One step on the device: lists become tensors, tensors become logits. Owns the KV tensors."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cloud_engine.attention import invariant, paged
from cloud_engine.attention.batch import (
    FP8,
    NULL,
    UNLIMITED,
    Attention,
    AttentionBatch,
    Kernel,
    Span,
    decodes,
    first_block,
    pack,
    span,
)
from cloud_engine.attention.fp8 import Scaled
from cloud_engine.attention.select import Shape, select
from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.graphs import Capture, DecodeGraphs, DecodeInputs, record
from cloud_engine.engine.host_store import HostStore
from cloud_engine.engine.tiles import ROWS, tiles
from cloud_engine.model.config import LayerKind, ModelConfig
from cloud_engine.model.decoder import Decoder, Model, View
from cloud_engine.model.rotary import Rotation, rotary_table
from cloud_engine.staging import stage

MIN_GROUP = 4
"""Decodes fewer than this are cheaper one by one, each reading its blocks in place where they lie together."""


class Runner:
    """Computes a step's tokens and remembers their keys and values, per layer [2, num_blocks, block_size, Hkv, D].
    `packed` says what `attend` reads of a batch, see `cloud_engine.attention.batch.Kernel`. Raises ValueError for an
    FP8 cache without the scales of each layer."""

    def __init__(
        self, model: Model, config: EngineConfig, attend: Attention = paged.attend, *, packed: bool = False
    ) -> None:
        if config.deterministic:
            attend, packed = invariant.attend, False
            if not isinstance(model, Decoder) or model.peers.size > 1:
                raise ValueError("deterministic needs the whole model in one process")
            model.fix_rows(ROWS)
        self.model, self.config, self.packed = model, config, packed
        self.attend = Scaled(attend) if config.kv_dtype == "fp8" else attend
        if config.kv_dtype == "fp8" and len(config.kv_scales) != model.config.num_layers:
            raise ValueError("an FP8 cache needs kv_scales of every layer (see cloud_engine.engine.calibration)")
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        shape = (2, config.num_blocks, config.block_size, model.config.num_kv_heads, model.config.head_dim)
        held = FP8 if config.kv_dtype == "fp8" else self.dtype
        # Only the null block is read before it is written. Zeros everywhere would make a CPU hand out all pages now.
        self.caches = [torch.empty(shape, dtype=held, device=self.device) for _ in range(model.config.num_layers)]
        for cache in self.caches:
            cache[:, NULL] = 0
        self.host = HostStore(self.caches, config.host_blocks)
        self.like = torch.empty(0, dtype=self.dtype, device=self.device)
        self.rotations = {kind.rope: self._rotation(kind) for kind in model.config.layers}
        self.graphs: DecodeGraphs | None = None

    def record(self, capture: Capture) -> None:
        """Compute decode steps by graphs from now on, if the model can be recorded. Needs a kernel that is `packed`."""
        with torch.inference_mode():
            logits = self.like.new_zeros(self.config.max_num_seqs, self.model.config.vocab_size)
            self.graphs = record(self._decode, self.config, logits, capture)

    def run(self, chunks: list[Chunk], last: Tensor | None = None) -> Tensor:
        """Logits [n, vocab] of all rows that are wanted, in order. `last` are the tokens [n] that the step before
        sampled; needed where a chunk has `previous`."""
        with torch.inference_mode():
            self.host.apply(swap for chunk in chunks for swap in chunk.swaps)
            if self.config.deterministic:
                parts = (self._tile(tile) for tile in tiles(chunks))
                return torch.cat([self._logits(*part) for part in parts])
            if self.graphs is not None and self.graphs.fits(chunks):
                return self.graphs.run(chunks, lambda tokens: self._resolve(chunks, tokens, last))
            inputs, views, rows = self._whole(chunks)
            self._resolve(chunks, inputs, last)
            return self._logits(inputs, views, rows)

    def hidden(self, chunks: list[Chunk]) -> Tensor:
        """Hidden states [T, hidden] after the last norm, of every row of these chunks. Needs a `Decoder` that is whole,
        see `embeds`."""
        model = self.model
        if not isinstance(model, Decoder):
            raise TypeError("only a whole model has hidden states")
        with torch.inference_mode():
            self.host.apply(swap for chunk in chunks for swap in chunk.swaps)
            parts = map(self._tile, tiles(chunks)) if self.config.deterministic else [self._whole(chunks)]
            rows = [model.hidden(inputs, views, self.attend, self.caches) for inputs, views, _ in parts]
            return torch.cat(rows)[: sum(chunk.count for chunk in chunks)]

    @property
    def embeds(self) -> bool:
        return isinstance(self.model, Decoder) and self.config.num_ranks == 1

    def _logits(self, inputs: Tensor, views: list[View], rows: Tensor) -> Tensor:
        return self.model(inputs, views, self.attend, self.caches, rows)

    def _whole(self, chunks: list[Chunk]) -> tuple[Tensor, list[View], Tensor]:
        """A step's tokens, how its layers see them, and the rows whose logits are wanted."""
        tokens, positions, rows = _rows(chunks)
        batch = self._packed if self.packed else self._batch
        views = self._views(self._tensor(positions), partial(batch, chunks))
        return self._tensor(tokens), views, self._tensor(rows)

    def _tile(self, chunks: list[Chunk]) -> tuple[Tensor, list[View], Tensor]:
        """The same of a part of a deterministic step. Rows that pad it are written to the null block."""
        tokens, positions, rows = _rows(chunks)
        padding = [0] * (ROWS - len(tokens))
        views = self._views(self._tensor(positions + padding), partial(self._tiled, chunks))
        return self._tensor(tokens + padding), views, self._tensor(rows)

    def _tiled(self, chunks: list[Chunk], window: int | None) -> AttentionBatch:
        size = self.config.block_size
        slots = [slot for chunk in chunks for slot in _slots(chunk, size)]
        starts = itertools.accumulate((chunk.count for chunk in chunks), initial=0)
        made = [
            invariant.tiles(row, chunk.start, chunk.end, chunk.table, size, self.device, window)
            for row, chunk in zip(starts, chunks, strict=False)
        ]
        slots += [NULL * size] * (ROWS - len(slots))
        return AttentionBatch(self._tensor(slots), window=window, tiles=tuple(itertools.chain(*made)))

    def _decode(self, inputs: DecodeInputs) -> Tensor:
        """A step of one row a sequence, without a look at what the inputs hold."""
        views = self._views(inputs.positions, partial(inputs.batch, longest=self.config.model_len))
        return self.model(inputs.tokens, views, self.attend, self.caches, inputs.starts[:-1].long())

    def _resolve(self, chunks: list[Chunk], tokens: Tensor, last: Tensor | None) -> None:
        """Put tokens that the host did not know in place. One that failed (negative) becomes any valid one: nobody will
        look at what follows it."""
        if last is None:
            return
        ends = itertools.accumulate(chunk.count for chunk in chunks)
        pending = [
            (end - 1, item.previous) for end, item in zip(ends, chunks, strict=True) if item.previous is not None
        ]
        rows, places = self._tensor([row for row, _ in pending]), self._tensor([place for _, place in pending])
        tokens.index_copy_(0, rows, last.index_select(0, places).clamp_(min=0))

    @property
    def failed(self) -> bool:
        return False

    def close(self) -> None:
        """It holds nothing but memory."""

    def _rotation(self, kind: LayerKind) -> Rotation:
        cos, sin = rotary_table(kind.rope, self.model.config.head_dim, self.config.model_len)
        return cos.to(self.like), sin.to(self.like)

    def _views(self, at: Tensor, batch: Callable[[int | None], AttentionBatch]) -> list[View]:
        """One for each layer of rows at these positions; what layers have in common is made once. `batch` makes what
        attention is told, given a window."""
        kinds = self.model.config.layers
        rotations = {rope: (cos[at], sin[at]) for rope, (cos, sin) in self.rotations.items()}
        batches = {window: batch(window) for window in {kind.window for kind in kinds}}
        views = [(rotations[kind.rope], batches[kind.window]) for kind in kinds]
        if self.config.kv_dtype == "fp8":
            pairs = zip(views, self.config.kv_scales, strict=True)
            views = [(rotation, replace(batch, scales=scales)) for (rotation, batch), scales in pairs]
        return views

    def _tensor(self, values: list[int]) -> Tensor:
        return stage(values, torch.int64, self.device)

    def _packed(self, chunks: list[Chunk], window: int | None) -> AttentionBatch:
        size = self.config.block_size
        sequences = [(chunk.count, chunk.end, chunk.table) for chunk in chunks]
        slots = self._tensor([slot for chunk in chunks for slot in _slots(chunk, size)])
        packed = pack(sequences, size, self.device, window=UNLIMITED if window is None else window)
        return AttentionBatch(slots, window=window, packed=packed)

    def _batch(self, chunks: list[Chunk], window: int | None) -> AttentionBatch:
        """Decodes of similar length (within a factor of two) form groups; what is left alone is a span of its own."""
        size = self.config.block_size
        slots: list[int] = []
        spans: list[Span] = []
        single: dict[int, list[tuple[int, int, list[int]]]] = {}
        for chunk in chunks:
            table, row, end = chunk.table, len(slots), chunk.end
            slots += _slots(chunk, size)
            if chunk.count == 1:
                seen = -(-end // size) - first_block(end, 1, size, window)
                single.setdefault((seen - 1).bit_length(), []).append((row, end, table))
            else:
                spans.append(span(row, chunk.count, end, table, size, self.device, window))
        groups = []
        for alike in single.values():
            if len(alike) >= MIN_GROUP:
                groups.append(decodes(alike, size, self.like, window))
            else:
                spans += [span(row, 1, end, table, size, self.device, window) for row, end, table in alike]
        return AttentionBatch(self._tensor(slots), tuple(spans), tuple(groups), window)


def attention_for(model: ModelConfig, config: EngineConfig) -> Kernel:
    """The attention that serves this model best here. On a GPU it is tried out first, which takes seconds."""
    if config.deterministic:
        return invariant.INVARIANT
    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    cache = FP8 if config.kv_dtype == "fp8" else dtype
    return select(Shape(model.num_heads, model.num_kv_heads, model.head_dim, config.block_size, dtype, device, cache))


def _slots(chunk: Chunk, size: int) -> list[int]:
    table = chunk.table
    return [table[at // size] * size + at % size for at in range(chunk.start, chunk.end)]


def _rows(chunks: list[Chunk]) -> tuple[list[int], list[int], list[int]]:
    """Tokens and positions of the step, and the rows whose logits are wanted."""
    tokens: list[int] = []
    positions: list[int] = []
    sampled: list[int] = []
    for chunk in chunks:
        tokens += chunk.tokens
        positions += range(chunk.start, chunk.end)
        sampled += range(len(tokens) - chunk.sampled, len(tokens))
    return tokens, positions, sampled
