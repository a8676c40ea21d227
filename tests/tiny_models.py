"""One model of a few thousand random weights for each family, as transformers makes and saves it."""

from collections.abc import Callable
from pathlib import Path

import tiny_llama
import torch
import transformers
from transformers import PreTrainedModel

from cloud_engine.attention import paged
from cloud_engine.attention.batch import AttentionBatch, span
from cloud_engine.model.rotary import rotary_table
from cloud_engine.model.weights import load_model

WINDOW = 7
THREE = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3}
GEMMA = {"sliding_window": WINDOW, "head_dim": 20, "query_pre_attn_scalar": 20, "tie_word_embeddings": True} | THREE
FAST = {"rope_type": "default", "rope_theta": 50.0}
STRETCHED = {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32}
QWEN_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 20}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("Qwen2", QWEN_WINDOW),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "gemma3, window": ("Gemma3", GEMMA),
    "gemma3, window, other scale, ropes": (
        "Gemma3",
        GEMMA
        | {
            "query_pre_attn_scalar": 44,
            "rope_parameters": {"full_attention": STRETCHED, "sliding_attention": FAST},
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": ("Mixtral", EXPERTS | {"sliding_window": None}),
    "mixtral, window": ("Mixtral", EXPERTS | {"sliding_window": WINDOW}),
    "qwen3 moe": ("Qwen3Moe", QWEN_EXPERTS | {"norm_topk_prob": False}),
    "qwen3 moe, normalised": ("Qwen3Moe", QWEN_EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3, window": ("Qwen3", {"head_dim": 20} | QWEN_WINDOW),
}


def make(name: str, **changes: object) -> PreTrainedModel:
    """Norms and biases are random too: as transformers initialises them, they would change nothing."""
    family, options = VARIANTS[name]
    configuration = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    if family in ("Qwen2", "Mixtral"):
        options = {"head_dim": None} | options
    torch.manual_seed(0)
    shape = {key: value for key, value in (tiny_llama.SHAPE | options | changes).items() if value is not None}
    model = getattr(transformers, f"{family}ForCausalLM")(configuration(**shape)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def save(folder: Path, name: str, **changes: object) -> Path:
    make(name, **changes).save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits_of(path: Path, tokens: list[int], change: Callable[[object], object] = lambda model: model) -> torch.Tensor:
    """Logits of every position of one prompt, through the paged cache."""
    model = change(load_model(path))
    config, size = model.config, 8
    blocks = -(-len(tokens) // size)
    caches = [torch.zeros(2, blocks + 1, size, config.num_kv_heads, config.head_dim) for _ in range(config.num_layers)]
    rows = torch.arange(len(tokens))
    table = list(range(1, blocks + 1))
    views = []
    for kind in config.layers:
        whole = span(0, len(tokens), len(tokens), table, size, torch.device("cpu"), kind.window)
        rotation = rotary_table(kind.rope, config.head_dim, len(tokens))
        views.append((rotation, AttentionBatch(rows + size, (whole,), window=kind.window)))
    return model(torch.tensor(tokens), views, paged.attend, caches, rows)
