"""Qwen3: Llama with a norm on each head of q and k, and a head dimension of its own; windows as in Qwen2."""

from cloud_engine.model import qwen2
from cloud_engine.model.config import ModelConfig, Raw, read, refuse, require_activation
from cloud_engine.model.decoder import Decoder, Family
from cloud_engine.model.layers import Block, Empty, GatedMlp, Norm, SelfAttention


def read_config(raw: Raw) -> ModelConfig:
    refuse(raw, "attention_bias", "mlp_bias")
    require_activation(raw, "hidden_act", "silu")
    return read({"head_dim": 128} | dict(raw), layers=qwen2.layers(raw))


def build(config: ModelConfig, empty: Empty) -> Decoder:
    def layer(_: int) -> Block:
        mlp = GatedMlp(config.hidden_size, config.intermediate_size, empty)
        return Block(config, empty, SelfAttention(config, empty, head_norm=Norm), mlp)

    return Decoder(config, empty, layer)


FAMILY = Family(read_config, build)
