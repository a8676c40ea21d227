"""Mixtral: Mistral with a mixture of experts in every layer, whose weights always sum to one."""

from cloud_engine.model import mistral
from cloud_engine.model.config import Experts, ModelConfig, Raw
from cloud_engine.model.decoder import Decoder, Family
from cloud_engine.model.experts import MixtureOfExperts
from cloud_engine.model.layers import Block, Empty, SelfAttention


def read_config(raw: Raw) -> ModelConfig:
    experts = Experts(
        count=int(raw["num_local_experts"]),
        chosen=int(raw["num_experts_per_tok"]),
        intermediate_size=int(raw["intermediate_size"]),
    )
    return mistral.read_config(raw, experts)


def build(config: ModelConfig, empty: Empty) -> Decoder:
    def layer(_: int) -> Block:
        experts = MixtureOfExperts(config.experts, config.hidden_size, empty, names=("w1", "w3", "w2"))
        return Block(config, empty, SelfAttention(config, empty), experts, name="block_sparse_moe")

    return Decoder(config, empty, layer)


FAMILY = Family(read_config, build)
