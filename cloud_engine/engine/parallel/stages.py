"""One stage of a model whose layers are divided over ranks: to its runner it is a model like any other."""

from collections.abc import Sequence

from torch import Tensor

from cloud_engine.attention.batch import Attention
from cloud_engine.engine.parallel.groups import Pipe
from cloud_engine.model.config import ModelConfig
from cloud_engine.model.decoder import Decoder, View


class StagedModel:
    """A call takes part in one step: activations [T, hidden] come from the stage before and go to the next; the last
    stage's logits [S, vocab] come back to the first, which gives them out (the others give none).

    Every step ends with the logits, even those of no rows, so that no stage is ever more than one step ahead.
    """

    def __init__(self, stage: Decoder, pipe: Pipe) -> None:
        self.stage, self.pipe = stage, pipe
        self.config: ModelConfig = stage.config
        self.like = stage.embedding.new_empty(0)

    def __call__(
        self, tokens: Tensor, views: Sequence[View], attend: Attention, caches: Sequence[Tensor], sampled: Tensor
    ) -> Tensor:
        stage, pipe = self.stage, self.pipe
        if self.config.stage.begins:
            x = stage.embed(tokens)
        else:
            x = pipe.receive(self.like.new_empty(len(tokens), self.config.hidden_size), pipe.rank - 1)
        x = stage.through(x, views, attend, caches, sampled if self.config.stage.ends else None)
        if not self.config.stage.ends:
            pipe.send(x, pipe.rank + 1)
        return self._logits(x, sampled)

    def _logits(self, x: Tensor, sampled: Tensor) -> Tensor:
        """Of the ranks of a stage only the first has logits, so only those send and receive any."""
        none, last = x.new_empty(0, self.config.vocab_size), self.pipe.size - 1
        if self.config.stage.ends:
            logits = self.stage.predict(x)
            if self.stage.peers.rank == 0:
                self.pipe.send(logits, 0)
            return none
        if self.config.stage.begins and self.stage.peers.rank == 0:
            return self.pipe.receive(x.new_empty(len(sampled), self.config.vocab_size), last)
        return none
