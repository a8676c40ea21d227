"""The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU; no biases."""

from torch import Tensor

from cloud_engine.model.config import ModelConfig, Raw, alike, read, refuse, require_activation
from cloud_engine.model.decoder import Decoder, Family
from cloud_engine.model.layers import Block, Empty, GatedMlp, SelfAttention


def read_config(raw: Raw) -> ModelConfig:
    refuse(raw, "attention_bias", "mlp_bias", "sliding_window", "num_local_experts")
    require_activation(raw, "hidden_act", "silu")
    return read(raw, layers=alike(raw))


def build(config: ModelConfig, empty: Empty) -> Decoder:
    def layer(_: int) -> Block:
        mlp = GatedMlp(config.hidden_size, config.intermediate_size, empty)
        return Block(config, empty, SelfAttention(config, empty), mlp)

    return Decoder(config, empty, layer)


def from_gguf(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """GGUF stores rotary pairs of q and k side by side (i, i + 1); we pair (i, i + D/2), as Hugging Face does."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    rows, columns = tensor.shape
    return tensor.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


FAMILY = Family(read_config, build, from_gguf=from_gguf)
