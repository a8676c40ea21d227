"""Shape of a model, read from the fields of a Hugging Face `config.json` (GGUF metadata is put under the same names).

Here is what all families have in common; each family's file reads the rest. What we cannot compute exactly is refused,
by name: better no answer than a wrong one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import BadRequest
from shared.gguf import ModelInvalid

Raw = Mapping[str, Any]
"""The fields of a configuration, not yet looked at."""


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


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions. `factors` are divisors of the frequencies, one each, that a GGUF file carries for a scaling."""

    theta: float
    scaling: RopeScaling | None = None
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerKind:
    """How a layer sees positions: its rotation, and how many of the last tokens (itself included); None is all."""

    rope: Rope
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """`chosen` of `count` experts compute each token; their weights sum to one if `normalised`. The layers `dense`
    have a plain MLP instead. `held` is None, or the experts that this rank has. The default: there are none."""

    count: int = 0
    chosen: int = 0
    intermediate_size: int = 0
    normalised: bool = True
    dense: frozenset[int] = frozenset()
    held: range | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Which of a model's layers are computed here: those from `first_layer` on, and whether it begins (embedding) or
    ends (output projection) here. The default: a model in one piece."""

    first_layer: int = 0
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Of a whole model, or of the part that one rank has (`division.divide`): then heads, layers and the width of the
    feed-forward part are that rank's own, vocabulary and hidden size still the model's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    layers: tuple[LayerKind, ...]
    tied: bool = False
    """The output projection is the embedding."""
    experts: Experts = Experts()
    query_scale: float = 1.0
    """Attention scores are q k / sqrt(head_dim) times this."""
    stage: Stage = Stage()
    kv_copies: int = 1
    """Ranks that hold the same KV heads."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_values(self) -> int:
        """Numbers kept for one token over all layers: keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def read(
    raw: Raw, *, layers: Sequence[LayerKind], tied: bool = False, experts: Experts | None = None, query_scale: float = 1
) -> ModelConfig:
    """The fields that every family has. Raises ModelInvalid for dimensions that cannot be, KeyError, TypeError or
    ValueError for a field that is missing or of another type."""
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    config = ModelConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(raw["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        context_length=int(raw["max_position_embeddings"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        layers=tuple(layers),
        tied=bool(raw.get("tie_word_embeddings", tied)),
        experts=experts or Experts(),
        query_scale=query_scale,
    )
    _check_dimensions(config)
    if experts and not (1 <= experts.chosen <= experts.count and experts.intermediate_size > 0):
        raise ModelInvalid("the numbers of experts do not fit together", param="model")
    if int(raw.get("rotary_dim") or config.head_dim) != config.head_dim:
        raise UnsupportedModel("partial rotary embeddings are not supported", param="model")
    return config


def alike(raw: Raw, window: int | None = None) -> list[LayerKind]:
    """All layers of one kind."""
    return [LayerKind(read_rope(raw), window)] * int(raw["num_hidden_layers"])


def read_rope(raw: Raw) -> Rope:
    """From `rope_parameters`, or `rope_theta` and `rope_scaling` in older files. Raises UnsupportedModel for another
    scaling than ours."""
    nested = raw.get("rope_parameters") or {}
    scaling = _scaling(nested or raw.get("rope_scaling") or {})
    if float(nested.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModel("partial rotary embeddings are not supported", param="model")
    theta = float(nested.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    return Rope(theta, scaling, tuple(raw.get("rope_factors", ())))


def refuse(raw: Raw, *names: str) -> None:
    """Raises UnsupportedModel if one of these options is set, or weights are quantized in a way that is not GGUF's."""
    for name in ("quantization_config", *names):
        if raw.get(name):
            raise UnsupportedModel(
                f"the configuration sets {name} to {raw[name]!r}, which is not supported", param="model"
            )


def require_activation(raw: Raw, name: str, wanted: str) -> None:
    if raw.get(name, wanted) != wanted:
        raise UnsupportedModel(f"{name} is {raw[name]!r} in the configuration; supported: {wanted}", param="model")


def _scaling(raw: Raw) -> RopeScaling | None:
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


def _check_dimensions(config: ModelConfig) -> None:
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.context_length)
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    windows = [kind.window for kind in config.layers if kind.window is not None]
    if min(*sizes, *heads, *windows) < 1 or config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise ModelInvalid("the model's dimensions do not fit together", param="model")
    if any(len(kind.rope.factors) not in (0, config.head_dim // 2) for kind in config.layers):
        raise ModelInvalid("rope_freqs does not fit the head dimension", param="model")
