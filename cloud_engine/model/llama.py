"""The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Inference only.

The tokens of all sequences of a step lie one after the other ([T, hidden]): only attention knows which belong together.
Projections that read the same input are one matrix: q, k and v; gate and up.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cloud_engine.attention.batch import Attention, AttentionBatch
from cloud_engine.model.config import ModelConfig
from cloud_engine.model.projection import Projection

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the step's positions, each [T, 1, D/2]."""

Empty = Callable[[int, int], Tensor]
"""Makes an uninitialised weight [outputs, inputs] of the model's dtype, on its device."""


class Layer:
    """One transformer block. Weights are [outputs, inputs]; there are no biases."""

    def __init__(self, config: ModelConfig, empty: Empty) -> None:
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.eps = config.rms_norm_eps
        self.attention_norm = empty(1, config.hidden_size)[0]
        self.qkv = Projection(empty((self.heads + 2 * self.kv_heads) * self.head_dim, config.hidden_size))
        self.out = Projection(empty(config.hidden_size, self.heads * self.head_dim))
        self.mlp_norm = empty(1, config.hidden_size)[0]
        self.gate_up = Projection(empty(2 * config.intermediate_size, config.hidden_size))
        self.down = Projection(empty(config.hidden_size, config.intermediate_size))

    def __call__(
        self, x: Tensor, rotation: Rotation, attend: Attention, cache: Tensor, batch: AttentionBatch
    ) -> Tensor:
        x = x + self._attention(norm(x, self.attention_norm, self.eps), rotation, attend, cache, batch)
        return x + self._mlp(norm(x, self.mlp_norm, self.eps))

    def _attention(
        self, x: Tensor, rotation: Rotation, attend: Attention, cache: Tensor, batch: AttentionBatch
    ) -> Tensor:
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        qk, v = qkv.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(qk, *rotation).split_with_sizes([self.heads, self.kv_heads], dim=1)
        return self.out(attend(q, k, v, cache, batch).view(x.shape[0], -1))

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))

    def destinations(self) -> dict[str, Tensor]:
        kv = self.kv_heads * self.head_dim
        q, k, v = self.qkv.weight.split_with_sizes([self.heads * self.head_dim, kv, kv])
        gate, up = self.gate_up.weight.chunk(2)
        return {
            "input_layernorm": self.attention_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": self.out.weight,
            "post_attention_layernorm": self.mlp_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": self.down.weight,
        }


class Llama:
    """A call gives the logits [S, vocab] of the rows `sampled` [S]; the other rows only fill the caches."""

    def __init__(self, config: ModelConfig, empty: Empty) -> None:
        self.config = config
        self.embedding = empty(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, empty) for _ in range(config.num_layers)]
        self.norm = empty(1, config.hidden_size)[0]
        self.head = Projection(self.embedding if config.tied else empty(config.vocab_size, config.hidden_size))

    def __call__(
        self,
        tokens: Tensor,
        rotation: Rotation,
        attend: Attention,
        caches: Sequence[Tensor],
        batch: AttentionBatch,
        sampled: Tensor,
    ) -> Tensor:
        x = F.embedding(tokens, self.embedding)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotation, attend, cache, batch)
        return self.head(norm(x[sampled], self.norm, self.config.rms_norm_eps))

    def pack(self) -> "Llama":
        """Put the weights into the order this processor likes best, once they are loaded. For good: `destinations` no
        longer leads to them."""
        for layer in self.layers:
            for projection in (layer.qkv, layer.out, layer.gate_up, layer.down):
                projection.pack()
        self.head.pack(keep=self.config.tied)
        return self

    def destinations(self) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint goes, under the names Hugging Face gives them: views of the weights."""
        places = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not self.config.tied:
            places["lm_head.weight"] = self.head.weight
        for index, layer in enumerate(self.layers):
            places |= {f"model.layers.{index}.{name}.weight": place for name, place in layer.destinations().items()}
        return places


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of the heads x [T, H, D] by its token's angles, cos and sin [T, 1, D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotary_table(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position below `length`, each [length, 1, D/2], in float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = _scaled(1.0 / config.rope_theta**exponents, config)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)[:, None]
    return angles.cos(), angles.sin()


def _scaled(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Apply the model's rotary scaling. `llama3` (as released with Llama 3.1) stretches wavelengths beyond the original
    context by `factor`, keeps short ones and interpolates between."""
    if config.rope_factors:
        frequencies = frequencies / torch.tensor(config.rope_factors)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_length * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
