"""Vectors of texts, from hidden states: computed chunk by chunk between the engine's other steps.

An input takes blocks of the pool for as long as it is computed, and shares none: every row is needed, so that no cached
prefix is of use. A call of `step` computes one step's budget of tokens, of several inputs if they are short; that is
what a decoding request has to wait for it. Requests are computed in the order in which they came.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.executor import Executor
from cloud_engine.engine.scheduler import Scheduler
from shared.errors import BadRequest, CausewayError, ContextTooLong, UnsupportedParameter

Vector = tuple[float, ...]


@dataclass(slots=True, eq=False)
class Job:
    """Token lists to be embedded, each to a vector of `dimensions` numbers (None: all) and of length 1. `done` is
    called once, on the engine's thread, with the vectors in order or an error. What is `cancelled` is not computed
    further."""

    inputs: list[list[int]]
    done: Callable[[tuple[Vector, ...] | CausewayError], None]
    dimensions: int | None = None
    cancelled: bool = False
    vectors: dict[int, Vector] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Input:
    job: Job
    index: int
    table: list[int] = field(default_factory=list)
    computed: int = 0
    pooled: Tensor | None = None
    """In float32: the sum of the rows so far, or the last of them."""

    @property
    def tokens(self) -> list[int]:
        return self.job.inputs[self.index]


class Embedder:
    """Owned by the engine's thread, as the `scheduler` whose blocks it borrows."""

    def __init__(self, runner: Executor, scheduler: Scheduler) -> None:
        self._runner, self._scheduler, self._config = runner, scheduler, runner.config
        self._waiting: deque[_Input] = deque()
        self._active: list[_Input] = []
        self.tokens = 0
        """How many were computed so far."""

    @property
    def has_work(self) -> bool:
        return bool(self._active or self._waiting)

    def jobs(self) -> Iterator[Job]:
        """Of all inputs that are not computed yet."""
        return (one.job for one in (*self._active, *self._waiting))

    def add(self, job: Job) -> None:
        """Raises BadRequest, ContextTooLong or UnsupportedParameter; then nothing has changed."""
        model, limit = self._runner.model.config, self._config.model_len
        if not self._runner.embeds:
            raise UnsupportedParameter("this model is divided among processes: it has no embeddings", param="model")
        if job.dimensions is not None and not 0 < job.dimensions <= model.hidden_size:
            raise BadRequest(f"dimensions must be 1 to {model.hidden_size}", param="dimensions")
        for at, tokens in enumerate(job.inputs):
            if not tokens:
                raise BadRequest("an input has no tokens", param=f"input[{at}]")
            if len(tokens) > limit:
                raise ContextTooLong(
                    f"an input has {len(tokens)} tokens, over the context length of {limit}", param=f"input[{at}]"
                )
            if min(tokens) < 0 or max(tokens) >= model.vocab_size:
                raise BadRequest(f"a token id is outside 0 to {model.vocab_size - 1}", param=f"input[{at}]")
        self._waiting += [_Input(job, index) for index in range(len(job.inputs))]

    def step(self) -> None:
        """Compute as much as fits into one step. To be called while nothing that was launched is under way."""
        self._drop_cancelled()
        budget, due = self._config.max_num_batched_tokens, list[tuple[_Input, Chunk]]()
        while budget and (one := self._next(len(due))) is not None:
            part = one.tokens[one.computed : one.computed + budget]
            due.append((one, Chunk(part, one.computed, one.table, 0)))
            budget -= len(part)
        if due:
            self._compute(due)

    def _next(self, index: int) -> _Input | None:
        """The next input to be part of this step. While requests wait for blocks, one input at a time takes some."""
        if index < len(self._active):
            return self._active[index]
        if not self._waiting or (self._active and self._scheduler.waiting):
            return None
        first = self._waiting[0]
        table = self._scheduler.lend(-(-len(first.tokens) // self._config.block_size))
        if table is None:
            return None
        first.table = table
        self._active.append(self._waiting.popleft())
        return first

    def _compute(self, due: list[tuple[_Input, Chunk]]) -> None:
        chunks = [chunk for _, chunk in due]
        # Taking blocks may have evicted some, whose content is to be saved before it is written over.
        chunks[0] = replace(chunks[0], swaps=self._scheduler.pool.host.drain())
        rows = torch.split(self._runner.hidden(chunks), [chunk.count for chunk in chunks])
        for (one, chunk), part in zip(due, rows, strict=True):
            one.computed += chunk.count
            self.tokens += chunk.count
            self._pool(one, part.float())
            if one.computed == len(one.tokens):
                self._finish(one)

    def _pool(self, one: _Input, rows: Tensor) -> None:
        with torch.inference_mode():
            if self._config.pooling == "last":
                one.pooled = rows[-1]
            else:
                one.pooled = rows.sum(0) if one.pooled is None else one.pooled + rows.sum(0)

    def _finish(self, one: _Input) -> None:
        """Its length does not matter: a mean is as good as a sum."""
        job = one.job
        self._release(one)
        if one.pooled is not None:
            shown = one.pooled[: job.dimensions].cpu()
            job.vectors[one.index] = tuple(torch.nn.functional.normalize(shown, dim=0).tolist())
        if len(job.vectors) == len(job.inputs) and not job.cancelled:
            job.done(tuple(job.vectors[index] for index in range(len(job.inputs))))

    def _release(self, one: _Input) -> None:
        self._active.remove(one)
        self._scheduler.pool.release(one.table)

    def _drop_cancelled(self) -> None:
        for one in [one for one in self._active if one.job.cancelled]:
            self._release(one)
        if any(one.job.cancelled for one in self._waiting):
            self._waiting = deque(one for one in self._waiting if not one.job.cancelled)
