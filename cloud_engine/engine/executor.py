"""What computes an engine's steps: a `Runner` of this process, or several processes (`engine.parallel`)."""

from typing import Protocol

import torch
from torch import Tensor

from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig
from cloud_engine.model.decoder import Model


class Executor(Protocol):
    """`config` is complete; `model` may be a part of one, `device` is where logits come out."""

    config: EngineConfig
    model: Model
    device: torch.device

    @property
    def failed(self) -> bool:
        """True if the next step will fail, which may be known before there is any."""

    def run(self, chunks: list[Chunk], last: Tensor | None = None) -> Tensor:
        """Logits [n, vocab] of all rows that are wanted, in order. `last` are the tokens [n] that the step before
        sampled; needed where a chunk has `previous`. An error means that nothing can be computed any more."""

    @property
    def embeds(self) -> bool:
        """Whether `hidden` may be called: not where several processes have parts of the model."""

    def hidden(self, chunks: list[Chunk]) -> Tensor:
        """Hidden states [T, hidden] after the last norm, of every row of these chunks."""

    def close(self) -> None:
        """Idempotent."""
