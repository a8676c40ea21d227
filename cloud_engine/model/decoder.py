"""A decoder-only model around any family's layers: embedding, layers, norm, output projection."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch.nn.functional as F
from torch import Tensor

from cloud_engine.attention.batch import Attention, AttentionBatch
from cloud_engine.model.config import ModelConfig, Raw
from cloud_engine.model.layers import Destinations, Empty, Norm, prefixed
from cloud_engine.model.projection import Projection
from cloud_engine.model.rotary import Rotation

View = tuple[Rotation, AttentionBatch]
"""A step as the layers of one kind see it: how its tokens are rotated, and what each may attend to."""


class Layer(Protocol):
    def __call__(
        self, x: Tensor, rotation: Rotation, attend: Attention, cache: Tensor, batch: AttentionBatch, /
    ) -> Tensor: ...
    def destinations(self) -> Destinations: ...
    def projections(self) -> Iterator[Projection]: ...


class Decoder:
    """A call gives the logits [S, vocab] of the rows `sampled` [S]; the other rows only fill the caches."""

    def __init__(
        self, config: ModelConfig, empty: Empty, layer: Callable[[int], Layer], norm: type[Norm] = Norm
    ) -> None:
        """`layer` makes the layer of an index."""
        self.config = config
        self.embedding = empty(config.vocab_size, config.hidden_size)
        self.layers = [layer(index) for index in range(config.num_layers)]
        self.norm = norm(config.hidden_size, config.rms_norm_eps, empty)
        self.head = Projection(self.embedding if config.tied else empty(config.vocab_size, config.hidden_size))

    def __call__(
        self, tokens: Tensor, views: Sequence[View], attend: Attention, caches: Sequence[Tensor], sampled: Tensor
    ) -> Tensor:
        """`views` and `caches` have one for each layer."""
        x = self.embed(tokens)
        for layer, (rotation, batch), cache in zip(self.layers, views, caches, strict=True):
            x = layer(x, rotation, attend, cache, batch)
        return self.head(self.norm(x[sampled]))

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding)

    def pack(self) -> Self:
        """Put the weights into the order this processor likes best, once they are loaded. For good: `destinations` no
        longer leads to them."""
        for layer in self.layers:
            for projection in layer.projections():
                projection.pack()
        self.head.pack(keep=self.config.tied)
        return self

    def destinations(self) -> Destinations:
        """Where each tensor of a checkpoint goes, under the names Hugging Face gives them: views of the weights."""
        places = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm.weight}
        if not self.config.tied:
            places["lm_head.weight"] = self.head.weight
        for index, layer in enumerate(self.layers):
            places |= prefixed(f"model.layers.{index}", layer.destinations())
        return places


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
