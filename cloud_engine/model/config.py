"""Shape of a Llama-family model, read from a Hugging Face `config.json` or from GGUF metadata.

What we cannot compute exactly is refused here, by name: better no answer than a wrong one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import BadRequest
from shared.gguf import ModelInvalid

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM")
SUPPORTED_GGUF = ("llama",)


class UnsupportedModel(BadRequest):
    """A sound model file of a kind that this engine does not run; the message says which kinds it does."""

    code = "unsupported_model"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Stretch of the rotary frequencies: `linear` divides all of them, `llama3` only the slow ones."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rope_factors: tuple[float, ...] = ()
    """Divisors of the rotary frequencies, one each, that a GGUF file carries instead of `rope_scaling`."""
    tied: bool = False
    """The output projection is the embedding."""

    @property
    def kv_values(self) -> int:
        """Numbers kept for one token over all layers: keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def from_hugging_face(raw: Mapping[str, Any]) -> ModelConfig:
    """Raises UnsupportedModel for another architecture or variant, ModelInvalid for a missing or impossible field."""
    _check_variant(raw)
    try:
        heads = int(raw["num_attention_heads"])
        rope = raw.get("rope_parameters") or {}
        config = ModelConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
            context_length=int(raw["max_position_embeddings"]),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope or raw.get("rope_scaling") or {}),
            tied=bool(raw.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelInvalid(f"config.json: {type(error).__name__} at {error}", param="model") from error
    return _possible(config)


def from_gguf(
    metadata: Mapping[str, Any], *, vocab_size: int, tied: bool, rope_factors: tuple[float, ...]
) -> ModelConfig:
    """`metadata` holds the file's scalar entries. Raises like `from_hugging_face`."""
    architecture = metadata.get("general.architecture")
    if architecture not in SUPPORTED_GGUF:
        raise UnsupportedModel(
            f"GGUF architecture {architecture!r}; supported: {', '.join(SUPPORTED_GGUF)}", param="model"
        )
    values = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    if values.get("expert_count"):
        raise UnsupportedModel("mixture of experts is not supported; supported: dense llama", param="model")
    scaling = values.get("rope.scaling.type", "none")
    try:
        heads = int(values["attention.head_count"])
        head_dim = int(values.get("attention.key_length") or int(values["embedding_length"]) // heads)
        config = ModelConfig(
            vocab_size=vocab_size,
            hidden_size=int(values["embedding_length"]),
            intermediate_size=int(values["feed_forward_length"]),
            num_layers=int(values["block_count"]),
            num_heads=heads,
            num_kv_heads=int(values.get("attention.head_count_kv") or heads),
            head_dim=head_dim,
            context_length=int(values["context_length"]),
            rms_norm_eps=float(values["attention.layer_norm_rms_epsilon"]),
            rope_theta=float(values.get("rope.freq_base") or 10000.0),
            rope_scaling=_rope_scaling({"type": scaling, "factor": values.get("rope.scaling.factor", 1.0)}),
            rope_factors=rope_factors,
            tied=tied,
        )
        rotated = int(values.get("rope.dimension_count") or head_dim)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelInvalid(f"GGUF metadata: {type(error).__name__} at {error}", param="model") from error
    if rotated != head_dim:
        raise UnsupportedModel("partial rotary embeddings are not supported", param="model")
    return _possible(config)


def _check_variant(raw: Mapping[str, Any]) -> None:
    named = raw.get("architectures") or ["none"]
    if named[0] not in SUPPORTED:
        raise UnsupportedModel(f"architecture {named[0]!r}; supported: {', '.join(SUPPORTED)}", param="model")
    refused = {
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "quantization_config": bool(raw.get("quantization_config")),
        "sliding_window": raw.get("sliding_window") is not None,
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
    }
    for name, present in refused.items():
        if present:
            raise UnsupportedModel(f"config.json sets {name} to {raw[name]!r}, which is not supported", param="model")


def _rope_scaling(raw: Mapping[str, Any]) -> RopeScaling | None:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind in ("default", "none"):
        return None
    if kind not in ("linear", "llama3"):
        raise UnsupportedModel(f"rope scaling {kind!r}; supported: linear, llama3", param="model")
    return RopeScaling(
        kind=kind,
        factor=float(raw["factor"]),
        low_freq_factor=float(raw.get("low_freq_factor", 1.0)),
        high_freq_factor=float(raw.get("high_freq_factor", 4.0)),
        original_length=int(raw.get("original_max_position_embeddings", 8192)),
    )


def _possible(config: ModelConfig) -> ModelConfig:
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.context_length)
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    if min(*sizes, *heads) < 1 or config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise ModelInvalid("the model's dimensions do not fit together", param="model")
    if config.rope_factors and len(config.rope_factors) != config.head_dim // 2:
        raise ModelInvalid("rope_freqs does not fit the head dimension", param="model")
    return config
