"""Decode steps as CUDA graphs: the kernels of a whole step are recorded once and launched by one call.

A graph has one number of rows and reads its inputs from the same memory each time. Graphs are recorded for some sizes,
always for the largest step that can come; a step is padded to the next of them. Padding rows are the first token of a
sequence in the null block: a context of one key that they write themselves, so nothing in them can be NaN, and nobody
reads them. How the attention divides its work is fixed by the longest context there can be, not by the step's.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog
import torch
from torch import Tensor

from cloud_engine.attention.batch import NULL, UNLIMITED, AttentionBatch, Packed
from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig
from cloud_engine.staging import stage

Replay = Callable[[], object]
Capture = Callable[[Callable[[], object]], Replay]
"""Records what a function launches; the result launches it again."""


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """What a decode step of n rows reads, in memory that stays where it is: `tokens`, `positions` and `slots` [n],
    int64, and as in `Packed` `starts` [n + 1], `contexts` [n] and `tables` [n, blocks of the longest sequence]."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    starts: Tensor
    contexts: Tensor
    tables: Tensor

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> "DecodeInputs":
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        contexts, tables = zeros(rows, dtype=torch.int32), zeros(rows, width, dtype=torch.int32)
        return cls(zeros(rows), zeros(rows), zeros(rows), starts, contexts, tables)

    def first(self, rows: int) -> "DecodeInputs":
        return DecodeInputs(
            self.tokens[:rows],
            self.positions[:rows],
            self.slots[:rows],
            self.starts[: rows + 1],
            self.contexts[:rows],
            self.tables[:rows],
        )

    def batch(self, window: int | None, longest: int) -> AttentionBatch:
        """For an attention that is launched as if a context were `longest` tokens."""
        rows = len(self.tokens)
        seen = UNLIMITED if window is None else window
        packed = Packed(self.starts, self.contexts, self.tables, rows, 1, longest, seen)
        return AttentionBatch(self.slots, window=window, packed=packed)

    def fill(self, chunks: list[Chunk], block_size: int) -> None:
        """Describe this step; rows without a chunk become padding."""
        padding = len(self.tokens) - len(chunks)
        ends = [chunk.end for chunk in chunks] + [1] * padding
        used = [chunk.table[: -(-chunk.end // block_size)] for chunk in chunks] + [[NULL]] * padding
        slots = [blocks[-1] * block_size + (end - 1) % block_size for blocks, end in zip(used, ends, strict=True)]
        tokens = [chunk.tokens[0] for chunk in chunks] + [0] * padding
        columns = stage([tokens, [end - 1 for end in ends], slots, ends], torch.int64, self.tokens.device)
        for ours, column in zip((self.tokens, self.positions, self.slots, self.contexts), columns, strict=True):
            ours.copy_(column)
        width = max(map(len, used))
        tables = [[*blocks, *[NULL] * (width - len(blocks))] for blocks in used]
        self.tables[:, :width].copy_(stage(tables, torch.int32, self.tables.device))


class DecodeGraphs:
    """`compute` gives the logits [n, vocab] of a decode step from its inputs, launching the same whatever they say."""

    def __init__(
        self, compute: Callable[[DecodeInputs], Tensor], config: EngineConfig, capture: Capture, logits: Tensor
    ) -> None:
        """`logits` [max_num_seqs, vocab] is where every graph leaves its result. Records the largest graph first: the
        smaller ones find room in the memory that it needed for what is in between."""
        self.sizes = graph_sizes(config.max_num_seqs)
        self.block_size = config.block_size
        self.logits = logits
        width = -(-config.model_len // config.block_size)
        self.inputs = DecodeInputs.empty(config.max_num_seqs, width, logits.device)
        self.inputs.fill([], config.block_size)
        self._replays: dict[int, Replay] = {}
        for size in reversed(self.sizes):
            self._replays[size] = capture(partial(self._step, compute, size))

    def fits(self, chunks: list[Chunk]) -> bool:
        """Whether this step has a graph: one row a sequence, all of them wanted."""
        return len(chunks) <= self.sizes[-1] and all(chunk.count == chunk.sampled == 1 for chunk in chunks)

    def run(self, chunks: list[Chunk], resolve: Callable[[Tensor], None]) -> Tensor:
        """Logits [n, vocab] of a step that `fits`, good until the next run. `resolve` puts tokens in place that the
        host does not know."""
        size = self.sizes[bisect_left(self.sizes, len(chunks))]
        inputs = self.inputs.first(size)
        inputs.fill(chunks, self.block_size)
        resolve(inputs.tokens)
        self._replays[size]()
        return self.logits[: len(chunks)]

    def _step(self, compute: Callable[[DecodeInputs], Tensor], size: int) -> None:
        self.logits[:size].copy_(compute(self.inputs.first(size)))


def graph_sizes(limit: int) -> list[int]:
    """Numbers of rows to record graphs for: dense where a row more costs most, and always `limit` itself."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 1024, 64), *range(1024, limit, 256)]
    return [*(size for size in sizes if size < limit), limit]


class CudaCapture:
    """Records on a CUDA device, all graphs in one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], object]) -> Replay:
        """Runs the step first, apart from the stream in use, so that libraries and kernels are loaded and compiled."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay


def record(
    compute: Callable[[DecodeInputs], Tensor], config: EngineConfig, logits: Tensor, capture: Capture
) -> DecodeGraphs | None:
    """Graphs for every decode step, or None if this model cannot be recorded here (say, because a layer asks the device
    for sizes); the log says which, and what memory they hold."""
    log = structlog.get_logger("causeway.engine")
    before = _reserved(logits.device)
    try:
        graphs = DecodeGraphs(compute, config, capture, logits)
    except Exception as error:  # drivers and compilers raise what they like, and none of it must stop the engine
        log.warning("decode", steps="eager", fallback=f"{type(error).__name__}: {error}")
        return None
    log.info("decode", steps="graphs", sizes=graphs.sizes, bytes=_reserved(logits.device) - before)
    return graphs


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
