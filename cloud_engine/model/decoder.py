"""A decoder-only model around any family's layers: embedding, layers, norm, output projection."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch.nn.functional as F
from torch import Tensor

from cloud_engine.attention.batch import Attention, AttentionBatch
from cloud_engine.engine.config import Quantization
from cloud_engine.model.config import ModelConfig, Raw
from cloud_engine.model.layers import Destination, Destinations, Empty, Norm, prefixed
from cloud_engine.model.projection import Projection
from cloud_engine.model.rotary import Rotation

View = tuple[Rotation, AttentionBatch]
"""A step as the layers of one kind see it: how its tokens are rotated, and what each may attend to."""


class Layer(Protocol):
    def __call__(
        self,
        x: Tensor,
        rotation: Rotation,
        attend: Attention,
        cache: Tensor,
        batch: AttentionBatch,
        rows: Tensor | None = None,
        /,
    ) -> Tensor:
        """From x [T, hidden] to the same shape, or to the results of `rows` alone: all keys and values are kept."""

    def destinations(self) -> Destinations: ...
    def projections(self) -> Iterator[Projection]: ...


class Model(Protocol):
    """What a runner computes with: a whole model, or a rank's part of one. A call gives the logits [S, vocab] of the
    rows `sampled` [S] of `tokens` [T], or [0, vocab] at a rank that has none; `views` and `caches` are those of its
    layers."""

    config: ModelConfig

    def __call__(
        self, tokens: Tensor, views: Sequence[View], attend: Attention, caches: Sequence[Tensor], sampled: Tensor, /
    ) -> Tensor: ...


class Decoder:
    """A call gives the logits [S, vocab] of the rows `sampled` [S]; the other rows only fill the caches.

    Ranks that share the model have equal parts of the vocabulary, the last one padded; their logits meet at rank 0, the
    others get none. A stage of a pipeline has `embed`, `through` and `predict` called by whom it is a part of.
    """

    def __init__(
        self, config: ModelConfig, empty: Empty, layer: Callable[[int], Layer], norm: type[Norm] = Norm
    ) -> None:
        """`layer` makes the layer of an index, counted from the whole model's first."""
        self.config, self.peers, stage = config, empty.peers, config.stage
        self.vocabulary = -(-config.vocab_size // self.peers.size)
        self.embedding = self._vocabulary(empty, needed=stage.begins or (stage.ends and config.tied))
        self.layers = [layer(stage.first_layer + index) for index in range(config.num_layers)]
        self.norm = norm(config.hidden_size, config.rms_norm_eps, empty)
        self.head = Projection(self.embedding if config.tied else self._vocabulary(empty, needed=stage.ends))

    def __call__(
        self, tokens: Tensor, views: Sequence[View], attend: Attention, caches: Sequence[Tensor], sampled: Tensor
    ) -> Tensor:
        """`views` and `caches` have one for each layer."""
        return self.predict(self.through(self.embed(tokens), views, attend, caches, sampled))

    def hidden(self, tokens: Tensor, views: Sequence[View], attend: Attention, caches: Sequence[Tensor]) -> Tensor:
        """What the output projection would see of every row: [T, hidden]."""
        return self.norm(self.through(self.embed(tokens), views, attend, caches))

    def embed(self, tokens: Tensor) -> Tensor:
        if self.peers.size == 1:
            return F.embedding(tokens, self.embedding)
        rows = tokens - self.peers.rank * self.vocabulary
        ours = (rows >= 0) & (rows < self.vocabulary)
        return self.peers.sum(F.embedding(rows.where(ours, 0), self.embedding) * ours[:, None])

    def through(
        self,
        x: Tensor,
        views: Sequence[View],
        attend: Attention,
        caches: Sequence[Tensor],
        rows: Tensor | None = None,
    ) -> Tensor:
        """The layers, from x [T, hidden] to the same shape, or to the results of `rows`: of what nobody asks for, the
        last layer computes no more than keys and values."""
        wanted = [*[None] * (len(self.layers) - 1), rows]
        for layer, (rotation, batch), cache, of in zip(self.layers, views, caches, wanted, strict=True):
            x = layer(x, rotation, attend, cache, batch, of)
        return x

    def predict(self, x: Tensor) -> Tensor:
        return self.peers.gather(self.head(x, self.norm))[:, : self.config.vocab_size]

    def pack(self, quantization: Quantization = "none") -> Self:
        """Put the weights into the order this processor likes best, quantized if asked for, once they are loaded. For
        good: `destinations` no longer leads to them."""
        for layer in self.layers:
            for projection in layer.projections():
                projection.pack(quantization)
        if self.config.stage.ends:
            self.head.pack(quantization, keep=self.config.tied)
        return self

    def fix_rows(self, rows: int) -> None:
        """Compute every matrix product with this number of rows from now on: see `cloud_engine.engine.tiles`."""
        for projection in (*itertools.chain(*(layer.projections() for layer in self.layers)), self.head):
            projection.rows = rows

    def destinations(self) -> Destinations:
        """Where each tensor of a checkpoint that has a place here goes, under the name Hugging Face gives it."""
        stage, places = self.config.stage, {}
        if len(self.embedding):
            places["model.embed_tokens.weight"] = self._ours(self.embedding)
        for index, layer in enumerate(self.layers, stage.first_layer):
            places |= prefixed(f"model.layers.{index}", layer.destinations())
        if stage.ends:
            places["model.norm.weight"] = Destination(self.norm.weight)
        if stage.ends and not self.config.tied:
            places["lm_head.weight"] = self._ours(self.head.weight)
        return places

    def _vocabulary(self, empty: Empty, *, needed: bool) -> Tensor:
        """A weight with a row for each token of this rank; zeros where there is no such token, no row if not needed."""
        weight = empty(self.vocabulary if needed else 0, self.config.hidden_size)
        weight[len(self._ours(weight).target) :] = 0
        return weight

    def _ours(self, weight: Tensor) -> Destination:
        """The rows of a vocabulary's weight that have a token."""
        start = min(self.peers.rank * self.vocabulary, self.config.vocab_size)
        return Destination(weight[: self.config.vocab_size - start], start=start)


Adapt = Callable[[ModelConfig, str, Tensor], Tensor]
"""What a tensor of a checkpoint becomes in our weights, of the same shape, given its Hugging Face name."""


def as_it_is(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG001 - the shape of an Adapt
    return tensor


@dataclass(frozen=True, slots=True)
class Family:
    """All that loading needs to know of an architecture. `read` may refuse (UnsupportedModel)."""

    read: Callable[[Raw], ModelConfig]
    build: Callable[[ModelConfig, Empty], Decoder]
    from_safetensors: Adapt = as_it_is
    from_gguf: Adapt = as_it_is
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    """Layer tensors that GGUF names otherwise than for Llama: its name to Hugging Face's."""
