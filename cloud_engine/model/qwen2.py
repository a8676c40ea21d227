"""Qwen2: Llama with biases on q, k and v; some layers may see a window of the last tokens only."""

from cloud_engine.model.config import LayerKind, ModelConfig, Raw, read, read_rope, refuse, require_activation
from cloud_engine.model.decoder import Decoder, Family
from cloud_engine.model.layers import Block, Empty, GatedMlp, SelfAttention


def read_config(raw: Raw) -> ModelConfig:
    refuse(raw, "mlp_bias")
    require_activation(raw, "hidden_act", "silu")
    return read(raw, layers=layers(raw))


def layers(raw: Raw) -> list[LayerKind]:
    """Layers from `max_window_layers` on have the window, where it is used at all; newer files list each one's type."""
    count, rope = int(raw["num_hidden_layers"]), read_rope(raw)
    window = int(raw["sliding_window"]) if raw.get("use_sliding_window") and raw.get("sliding_window") else None
    first = int(raw.get("max_window_layers", count))
    listed = raw.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (count - first)
    if len(listed) != count:
        raise ValueError("layer_types")
    kinds = {"full_attention": LayerKind(rope), "sliding_attention": LayerKind(rope, window)}
    return [kinds[kind] for kind in listed]


def build(config: ModelConfig, empty: Empty) -> Decoder:
    def layer(_: int) -> Block:
        mlp = GatedMlp(config.hidden_size, config.intermediate_size, empty)
        return Block(config, empty, SelfAttention(config, empty, bias=True), mlp)

    return Decoder(config, empty, layer)


FAMILY = Family(read_config, build)
