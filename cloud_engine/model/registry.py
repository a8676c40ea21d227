"""Which family answers for which architecture name."""

from collections.abc import Mapping
from typing import Any

from cloud_engine.model import gemma3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from cloud_engine.model.config import ModelConfig, Raw, UnsupportedModel
from cloud_engine.model.decoder import Family
from shared.gguf import ModelInvalid

HUGGING_FACE: Mapping[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "Gemma3ForCausalLM": gemma3.FAMILY,
    "MixtralForCausalLM": mixtral.FAMILY,
    "Qwen3MoeForCausalLM": qwen3_moe.FAMILY,
}
GGUF: Mapping[str, Family] = {
    "llama": llama.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gemma3": gemma3.FAMILY,
}


def find(families: Mapping[str, Family], name: Any) -> Family:
    """Raises UnsupportedModel, which lists what is supported."""
    family = families.get(name) if isinstance(name, str) else None
    if family is None:
        raise UnsupportedModel(f"architecture {name!r}; supported: {', '.join(families)}", param="model")
    return family


def configure(family: Family, raw: Raw, source: str) -> ModelConfig:
    """Raises UnsupportedModel for a variant that the family does not compute, ModelInvalid for a missing or impossible
    field of `source`."""
    try:
        return family.read(raw)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelInvalid(f"{source}: {type(error).__name__} at {error}", param="model") from error
