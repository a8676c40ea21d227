"""Mistral: Llama whose layers may all see a window of the last tokens only."""

from cloud_engine.model import llama
from cloud_engine.model.config import Experts, ModelConfig, Raw, alike, read, refuse, require_activation
from cloud_engine.model.decoder import Family


def read_config(raw: Raw, experts: Experts | None = None) -> ModelConfig:
    refuse(raw, "attention_bias", "mlp_bias", "layer_types")
    require_activation(raw, "hidden_act", "silu")
    window = raw.get("sliding_window")
    return read(raw, layers=alike(raw, None if window is None else int(window)), experts=experts)


FAMILY = Family(read_config, llama.build)
