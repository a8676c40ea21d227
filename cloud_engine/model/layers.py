"""What the families' layers are made of. Inference only.

The tokens of all sequences of a step lie one after the other ([T, hidden]): only attention knows which belong together.
Projections that read the same input are one matrix: q, k and v; gate and up. Each part says where the tensors of a
checkpoint go (`destinations`: views of its weights by their Hugging Face names), and which matrices can be packed.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from cloud_engine.attention.batch import Attention, AttentionBatch
from cloud_engine.model.config import ModelConfig
from cloud_engine.model.projection import Projection
from cloud_engine.model.rotary import Rotation, rotate

Empty = Callable[[int, int], Tensor]
"""Makes an uninitialised weight [outputs, inputs] of the model's dtype, on its device."""

Destinations = dict[str, Tensor]


class Norm:
    """Divide by the root mean square over the last dimension, then multiply by the weight."""

    def __init__(self, size: int, eps: float, empty: Empty) -> None:
        self.weight, self.eps = empty(1, size)[0], eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FeedForward(Protocol):
    """The part of a block that sees each token by itself."""

    def __call__(self, x: Tensor, /) -> Tensor: ...
    def destinations(self) -> Destinations: ...
    def projections(self) -> Iterator[Projection]: ...


class SelfAttention:
    """Grouped-query attention. With `head_norm`, each head of q and k is normalised before it is rotated."""

    def __init__(
        self, config: ModelConfig, empty: Empty, *, bias: bool = False, head_norm: type[Norm] | None = None
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        outputs = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = Projection(empty(outputs, config.hidden_size), empty(1, outputs)[0] if bias else None)
        self.out = Projection(empty(config.hidden_size, self.heads * self.head_dim))
        self.head_norms: tuple[Norm, Norm] | None = None
        if head_norm is not None:
            q_norm, k_norm = (head_norm(self.head_dim, config.rms_norm_eps, empty) for _ in range(2))
            self.head_norms = q_norm, k_norm

    def __call__(
        self, x: Tensor, rotation: Rotation, attend: Attention, cache: Tensor, batch: AttentionBatch
    ) -> Tensor:
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        if self.head_norms is None:
            qk, v = qkv.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], dim=1)
            q, k = rotate(qk, *rotation).split_with_sizes([self.heads, self.kv_heads], dim=1)
        else:
            q, k, v = qkv.split_with_sizes([self.heads, self.kv_heads, self.kv_heads], dim=1)
            q, k = (rotate(norm(part), *rotation) for norm, part in zip(self.head_norms, (q, k), strict=True))
        return self.out(attend(q, k, v, cache, batch).view(x.shape[0], -1))

    def destinations(self) -> Destinations:
        kv = self.kv_heads * self.head_dim
        parts = {"weight": self.qkv.weight} | ({} if self.qkv.bias is None else {"bias": self.qkv.bias})
        places = {"o_proj.weight": self.out.weight}
        for kind, fused in parts.items():
            q, k, v = fused.split_with_sizes([self.heads * self.head_dim, kv, kv])
            places |= {f"q_proj.{kind}": q, f"k_proj.{kind}": k, f"v_proj.{kind}": v}
        if self.head_norms is not None:
            places |= {"q_norm.weight": self.head_norms[0].weight, "k_norm.weight": self.head_norms[1].weight}
        return places

    def projections(self) -> Iterator[Projection]:
        yield from (self.qkv, self.out)


class GatedMlp:
    """down(activation(gate x) * up x). `names` are those of gate, up and down in checkpoints."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        empty: Empty,
        activation: Callable[[Tensor], Tensor] = F.silu,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        self.gate_up = Projection(empty(2 * intermediate, hidden))
        self.down = Projection(empty(hidden, intermediate))
        self.activation, self.names = activation, names

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))

    def destinations(self) -> Destinations:
        places = (*self.gate_up.weight.chunk(2), self.down.weight)
        return {f"{name}.weight": place for name, place in zip(self.names, places, strict=True)}

    def projections(self) -> Iterator[Projection]:
        yield from (self.gate_up, self.down)


class Block:
    """Attention, then a feed-forward part, each on a normalised copy of what it adds to. `mlp` is the second part's
    name in checkpoints."""

    def __init__(
        self, config: ModelConfig, empty: Empty, attention: SelfAttention, mlp: FeedForward, name: str = "mlp"
    ) -> None:
        self.attention, self.mlp, self.mlp_name = attention, mlp, name
        self.attention_norm = Norm(config.hidden_size, config.rms_norm_eps, empty)
        self.mlp_norm = Norm(config.hidden_size, config.rms_norm_eps, empty)

    def __call__(
        self, x: Tensor, rotation: Rotation, attend: Attention, cache: Tensor, batch: AttentionBatch
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, attend, cache, batch)
        return x + self.mlp(self.mlp_norm(x))

    def destinations(self) -> Destinations:
        return (
            {"input_layernorm.weight": self.attention_norm.weight}
            | prefixed("self_attn", self.attention.destinations())
            | {"post_attention_layernorm.weight": self.mlp_norm.weight}
            | prefixed(self.mlp_name, self.mlp.destinations())
        )

    def projections(self) -> Iterator[Projection]:
        yield from self.attention.projections()
        yield from self.mlp.projections()


def prefixed(prefix: str, places: Destinations) -> Destinations:
    return {f"{prefix}.{name}": place for name, place in places.items()}
