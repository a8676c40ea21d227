"""What the families' layers are made of. Inference only.

The tokens of all sequences of a step lie one after the other ([T, hidden]): only attention knows which belong together.
Projections that read the same input are one matrix: q, k and v; gate and up. Each part says where the tensors of a
checkpoint go (`destinations`, by their Hugging Face names), and which matrices can be packed.

Where ranks share a model, each has some heads of the attention and some columns of the feed-forward part (or some
experts). What such a part gives is this rank's share of a sum; the block around it adds up the shares.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cloud_engine.attention.batch import Attention, AttentionBatch
from cloud_engine.model.config import ModelConfig
from cloud_engine.model.projection import Projection
from cloud_engine.model.rotary import Rotation
from cloud_engine.model.rowwise import rms_norm, rotate, silu_gate


class Peers(Protocol):
    """The ranks that share every matrix of these layers. All of them must call the same in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def sum(self, x: Tensor, /) -> Tensor:
        """The sum of all ranks' `x`, at each of them; may be computed in place."""

    def gather(self, x: Tensor, /) -> Tensor:
        """All ranks' `x` [n, columns] side by side, in their order, at rank 0; [0, columns] elsewhere."""


@dataclass(frozen=True, slots=True)
class Alone:
    """One rank has it all."""

    rank: int = 0
    size: int = 1

    def sum(self, x: Tensor, /) -> Tensor:
        return x

    def gather(self, x: Tensor, /) -> Tensor:
        return x


@dataclass(frozen=True, slots=True)
class Empty:
    """Makes an uninitialised weight [outputs, inputs] of the model's dtype, on its device, which `peers` share."""

    make: Callable[[int, int], Tensor]
    peers: Peers = Alone()

    def __call__(self, outputs: int, inputs: int) -> Tensor:
        return self.make(outputs, inputs)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a tensor of a checkpoint goes: `target`, a view of our weights, takes what lies from `start` on along
    `dim`, as much as it has room for."""

    target: Tensor
    dim: int = 0
    start: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.target.shape[self.dim]


def part(target: Tensor, peers: Peers, dim: int = 0, *, copies: int = 1) -> Destination:
    """An equal part for each rank, or for each `copies` ranks the same one."""
    return Destination(target, dim, peers.rank // copies * target.shape[dim])


Destinations = dict[str, Destination]


class Norm:
    """Divide by the root mean square over the last dimension, then multiply by the weight."""

    def __init__(self, size: int, eps: float, empty: Empty) -> None:
        self.weight, self.eps = empty(1, size)[0], eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class FeedForward(Protocol):
    """The part of a block that sees each token by itself: of norm(x), and perhaps `added` to what it gives."""

    def __call__(self, x: Tensor, norm: Norm, added: Tensor | None = None, /) -> Tensor: ...
    def destinations(self) -> Destinations: ...
    def projections(self) -> Iterator[Projection]: ...


class SelfAttention:
    """Grouped-query attention of norm(x), and perhaps `added` to what it gives. With `head_norm`, each head of q and k
    is normalised before it is rotated."""

    def __init__(
        self, config: ModelConfig, empty: Empty, *, bias: bool = False, head_norm: type[Norm] | None = None
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.peers, self.kv_copies = empty.peers, config.kv_copies
        outputs = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = Projection(empty(outputs, config.hidden_size), empty(1, outputs)[0] if bias else None)
        self.out = Projection(empty(config.hidden_size, self.heads * self.head_dim))
        self.head_norms: tuple[Norm, Norm] | None = None
        if head_norm is not None:
            q_norm, k_norm = (head_norm(self.head_dim, config.rms_norm_eps, empty) for _ in range(2))
            self.head_norms = q_norm, k_norm

    def __call__(
        self,
        x: Tensor,
        norm: Norm,
        rotation: Rotation,
        attend: Attention,
        cache: Tensor,
        batch: AttentionBatch,
        rows: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """Of all rows, or of these alone; `added` has as many."""
        qkv = self.qkv(x, norm).view(x.shape[0], -1, self.head_dim)
        if self.head_norms is None:
            qk, v = qkv.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], dim=1)
            q, k = rotate(qk, *rotation).split_with_sizes([self.heads, self.kv_heads], dim=1)
        else:
            q, k, v = qkv.split_with_sizes([self.heads, self.kv_heads, self.kv_heads], dim=1)
            q, k = (rotate(normed(part), *rotation) for normed, part in zip(self.head_norms, (q, k), strict=True))
        attended = attend(q, k, v, cache, batch).view(x.shape[0], -1)
        return self.out(attended if rows is None else attended[rows], added=added)

    def destinations(self) -> Destinations:
        kv = self.kv_heads * self.head_dim
        parts = {"weight": self.qkv.weight} | ({} if self.qkv.bias is None else {"bias": self.qkv.bias})
        places = {"o_proj.weight": part(self.out.weight, self.peers, dim=1)}
        for kind, fused in parts.items():
            q, k, v = fused.split_with_sizes([self.heads * self.head_dim, kv, kv])
            places[f"q_proj.{kind}"] = part(q, self.peers)
            places[f"k_proj.{kind}"] = part(k, self.peers, copies=self.kv_copies)
            places[f"v_proj.{kind}"] = part(v, self.peers, copies=self.kv_copies)
        for name, norm in zip(("q_norm", "k_norm"), self.head_norms or (), strict=False):
            places[f"{name}.weight"] = Destination(norm.weight)
        return places

    def projections(self) -> Iterator[Projection]:
        yield from (self.qkv, self.out)


class GatedMlp:
    """down(activation(gate x) * up x) of norm(x), if there is a norm, and perhaps `added` to that; `gate` makes the
    product of the two, given beside each other. `names` are those of gate, up and down in checkpoints."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        empty: Empty,
        gate: Callable[[Tensor], Tensor] = silu_gate,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        self.gate_up = Projection(empty(2 * intermediate, hidden), gate=gate)
        self.down = Projection(empty(hidden, intermediate))
        self.names, self.peers = names, empty.peers

    def __call__(self, x: Tensor, norm: Norm | None = None, added: Tensor | None = None) -> Tensor:
        return self.down(self.gate_up(x, norm), added=added)

    def destinations(self) -> Destinations:
        rows = (part(weight, self.peers) for weight in self.gate_up.weight.chunk(2))
        places = (*rows, part(self.down.weight, self.peers, dim=1))
        return {f"{name}.weight": place for name, place in zip(self.names, places, strict=True)}

    def projections(self) -> Iterator[Projection]:
        yield from (self.gate_up, self.down)


class Block:
    """Attention, then a feed-forward part, each of what is normalised and added to it. `name` is the second part's
    in checkpoints."""

    def __init__(
        self, config: ModelConfig, empty: Empty, attention: SelfAttention, mlp: FeedForward, name: str = "mlp"
    ) -> None:
        self.attention, self.mlp, self.mlp_name, self.peers = attention, mlp, name, empty.peers
        self.attention_norm = Norm(config.hidden_size, config.rms_norm_eps, empty)
        self.mlp_norm = Norm(config.hidden_size, config.rms_norm_eps, empty)

    def __call__(
        self,
        x: Tensor,
        rotation: Rotation,
        attend: Attention,
        cache: Tensor,
        batch: AttentionBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        first = self.peers.rank == 0  # One rank's share has x in it.
        added = None if not first else x if rows is None else x[rows]
        x = self.peers.sum(self.attention(x, self.attention_norm, rotation, attend, cache, batch, rows, added))
        return self.peers.sum(self.mlp(x, self.mlp_norm, x if first else None))

    def destinations(self) -> Destinations:
        return (
            {"input_layernorm.weight": Destination(self.attention_norm.weight)}
            | prefixed("self_attn", self.attention.destinations())
            | {"post_attention_layernorm.weight": Destination(self.mlp_norm.weight)}
            | prefixed(self.mlp_name, self.mlp.destinations())
        )

    def projections(self) -> Iterator[Projection]:
        yield from self.attention.projections()
        yield from self.mlp.projections()


def prefixed(prefix: str, places: Destinations) -> Destinations:
    return {f"{prefix}.{name}": place for name, place in places.items()}
