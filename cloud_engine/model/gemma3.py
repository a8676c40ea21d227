"""Gemma 3 (text): scaled embedding, norms before and after each part, GELU, most layers with a sliding window.

The weights of its norms are stored as their distance from one; here they are the factors themselves, in float32 as the
norms are computed. The scale of attention, where it is not that of the head dimension, goes into the norm of q.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cloud_engine.attention.batch import Attention, AttentionBatch
from cloud_engine.model.config import LayerKind, ModelConfig, Raw, Rope, read, read_rope, refuse, require_activation
from cloud_engine.model.decoder import Decoder, Family
from cloud_engine.model.layers import Destination, Destinations, Empty, GatedMlp, Norm, SelfAttention, prefixed
from cloud_engine.model.projection import Projection
from cloud_engine.model.rotary import Rotation
from cloud_engine.model.rowwise import rms_norm

PATTERN = 6
"""Every so many layers, one sees the whole context."""
LAYERS_27B = 62
"""The one size whose attention scale is not that of its head dimension; GGUF files do not say it."""


class GemmaNorm(Norm):
    """Computed in float32, the weight too."""

    def __init__(self, size: int, eps: float, empty: Empty) -> None:
        super().__init__(size, eps, empty)
        self.weight = self.weight.float()

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), self.weight, self.eps).to(x.dtype)


def gelu_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


class GemmaBlock:
    """Each part is normalised before and after, and then added."""

    def __init__(self, config: ModelConfig, empty: Empty) -> None:
        self.peers = empty.peers
        self.attention = SelfAttention(config, empty, head_norm=GemmaNorm)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, empty, gate=gelu_gate)
        self.norms = [GemmaNorm(config.hidden_size, config.rms_norm_eps, empty) for _ in range(4)]

    def __call__(
        self,
        x: Tensor,
        rotation: Rotation,
        attend: Attention,
        cache: Tensor,
        batch: AttentionBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        before_attention, after_attention, before_mlp, after_mlp = self.norms
        attended = self.attention(x, before_attention, rotation, attend, cache, batch, rows)
        x = (x if rows is None else x[rows]) + after_attention(self.peers.sum(attended))
        return x + after_mlp(self.peers.sum(self.mlp(x, before_mlp)))

    def destinations(self) -> Destinations:
        parts = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        norms = zip(parts, self.norms, strict=True)
        places = {f"{part}_layernorm.weight": Destination(norm.weight) for part, norm in norms}
        return places | prefixed("self_attn", self.attention.destinations()) | prefixed("mlp", self.mlp.destinations())

    def projections(self) -> Iterator[Projection]:
        yield from self.attention.projections()
        yield from self.mlp.projections()


class Gemma3(Decoder):
    def __init__(self, config: ModelConfig, empty: Empty) -> None:
        super().__init__(config, empty, lambda _: GemmaBlock(config, empty), norm=GemmaNorm)
        # Rounded as the embedding is: that is how the model was trained.
        self.scale = torch.tensor(config.hidden_size**0.5, dtype=self.embedding.dtype).item()

    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens) * self.scale


def read_config(raw: Raw) -> ModelConfig:
    refuse(raw, "attention_bias", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")
    require_activation(raw, "hidden_activation", "gelu_pytorch_tanh")
    fields = {"head_dim": 256} | dict(raw)
    scalar = fields.get("query_pre_attn_scalar") or _usual_scalar(fields)
    scale = (int(fields["head_dim"]) / float(scalar)) ** 0.5
    return read(fields, layers=layers(raw), tied=True, query_scale=scale)


def layers(raw: Raw) -> list[LayerKind]:
    """Newer files list each layer's type and have one set of rotary parameters for each type; in older ones, as in
    GGUF, every so many layers see all, and only these have the scaling."""
    count, pattern = int(raw["num_hidden_layers"]), int(raw.get("sliding_window_pattern") or PATTERN)
    listed = raw.get("layer_types") or [
        "full_attention" if (index + 1) % pattern == 0 else "sliding_attention" for index in range(count)
    ]
    if len(listed) != count:
        raise ValueError("layer_types")
    whole, local = _ropes(raw)
    kinds = {"full_attention": LayerKind(whole), "sliding_attention": LayerKind(local, int(raw["sliding_window"]))}
    return [kinds[kind] for kind in listed]


def _ropes(raw: Raw) -> tuple[Rope, Rope]:
    """Of the layers that see all, and of the others."""
    listed = raw.get("rope_parameters")
    if listed:
        whole, local = {"rope_theta": 1e6} | listed["full_attention"], {"rope_theta": 1e4} | listed["sliding_attention"]
        return read_rope({"rope_parameters": whole}), read_rope({"rope_parameters": local})
    return read_rope({"rope_theta": 1e6} | dict(raw)), Rope(float(raw.get("rope_local_base_freq") or 1e4))


def _usual_scalar(raw: Raw) -> float:
    if int(raw["num_hidden_layers"]) == LAYERS_27B:
        return int(raw["hidden_size"]) / int(raw["num_attention_heads"])
    return int(raw["head_dim"])


def from_safetensors(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    if name.endswith("norm.weight"):
        return from_gguf(config, name, tensor.float() + 1)
    return tensor


def from_gguf(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """GGUF has the factors themselves, too."""
    return tensor * config.query_scale if name.endswith("q_norm.weight") else tensor


FAMILY = Family(
    read_config,
    Gemma3,
    from_safetensors=from_safetensors,
    from_gguf=from_gguf,
    gguf_names={
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
)
