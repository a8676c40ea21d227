"""Qwen3-MoE: Qwen3 with a mixture of experts in most layers."""

from cloud_engine.model.config import Experts, ModelConfig, Raw, alike, read, refuse, require_activation
from cloud_engine.model.decoder import Decoder, Family
from cloud_engine.model.experts import MixtureOfExperts
from cloud_engine.model.layers import Block, Empty, GatedMlp, Norm, SelfAttention


def read_config(raw: Raw) -> ModelConfig:
    refuse(raw, "attention_bias", "mlp_bias")
    require_activation(raw, "hidden_act", "silu")
    count, step = int(raw["num_hidden_layers"]), int(raw.get("decoder_sparse_step", 1))
    listed = raw.get("mlp_only_layers") or ()
    experts = Experts(
        count=int(raw.get("num_experts") or raw["num_local_experts"]),
        chosen=int(raw["num_experts_per_tok"]),
        intermediate_size=int(raw["moe_intermediate_size"]),
        normalised=bool(raw.get("norm_topk_prob", False)),
        dense=frozenset(index for index in range(count) if index in listed or (index + 1) % step),
    )
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    return read(raw, layers=alike(raw, None if window is None else int(window)), experts=experts)


def build(config: ModelConfig, empty: Empty) -> Decoder:
    def layer(index: int) -> Block:
        mlp = (
            GatedMlp(config.hidden_size, config.intermediate_size, empty)
            if index in config.experts.dense
            else MixtureOfExperts(config.experts, config.hidden_size, empty)
        )
        return Block(config, empty, SelfAttention(config, empty, head_norm=Norm), mlp)

    return Decoder(config, empty, layer)


FAMILY = Family(read_config, build)
