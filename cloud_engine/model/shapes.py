"""Models by shape alone: the dimensions of well-known ones, with random weights made on the device from a seed.

What a step costs depends on shapes and not on what the weights say, so speed can be measured without any file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cloud_engine.engine.config import DType
from cloud_engine.model.config import ModelConfig
from cloud_engine.model.decoder import Decoder
from cloud_engine.model.layers import Empty
from cloud_engine.model.registry import HUGGING_FACE, configure
from shared.errors import BadRequest

_QWEN3: dict[str, Any] = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """An architecture and the fields of its `config.json`."""

    name: str
    architecture: str
    fields: Mapping[str, Any] = field(hash=False)

    @property
    def config(self) -> ModelConfig:
        return configure(HUGGING_FACE[self.architecture], self.fields, self.name)


def _shape(name: str, architecture: str, **fields: Any) -> Shape:
    return Shape(name, architecture, _QWEN3 | fields)


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        _shape(
            "tiny",
            "Qwen3ForCausalLM",
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        ),
        _shape(
            "tiny-moe",
            "Qwen3MoeForCausalLM",
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        ),
        _shape(
            "0.6b",
            "Qwen3ForCausalLM",
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
        _shape(
            "8b",
            "Qwen3ForCausalLM",
            hidden_size=4096,
            intermediate_size=12_288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        _shape(
            "30b-a3b",
            "Qwen3MoeForCausalLM",
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
        ),
    )
}
"""Those of Qwen3-0.6B, Qwen3-8B and Qwen3-30B-A3B, and two small enough for any test."""


def find_shape(name: str) -> Shape:
    """Raises BadRequest, which lists what there is."""
    if name not in SHAPES:
        raise BadRequest(f"shape {name!r}; there are {', '.join(SHAPES)}", param="shape")
    return SHAPES[name]


def random_model(shape: Shape, *, dtype: DType = "float32", device: str = "cpu", seed: int = 0) -> Decoder:
    """Weights with the variance that keeps a signal's size through a layer; norms are ones. Of a seed, on one kind of
    device, always the same."""
    like = torch.empty(0, dtype=getattr(torch, dtype), device=device)
    model = HUGGING_FACE[shape.architecture].build(shape.config, Empty(like.new_empty))
    noise = torch.Generator(device).manual_seed(seed)
    for place in model.destinations().values():
        if place.target.ndim == 1:
            place.target.fill_(1)
        else:
            place.target.normal_(0, place.target.shape[-1] ** -0.5, generator=noise)
    return model


def step_bytes(shape: Shape, rows: int, context: int, *, value_bytes: int, kv_value_bytes: int) -> int:
    """What a decode step of this many rows, each after `context` tokens, must read from memory at least: every weight
    once, but of a row's experts only those chosen (at random: the expected number of different ones), no embedding
    beyond the rows', and all keys and values."""
    config = shape.config
    model = HUGGING_FACE[shape.architecture].build(config, Empty(torch.empty(0, device="meta").new_empty))
    experts = config.experts
    used = 1 - (1 - experts.chosen / experts.count) ** rows if experts.count else 1.0
    numbers = 0.0
    for name, place in model.destinations().items():
        if name.endswith("embed_tokens.weight") and not config.tied:
            continue
        numbers += place.target.numel() * (used if ".experts." in name else 1)
    return int(numbers * value_bytes + rows * context * config.kv_values * kv_value_bytes)
