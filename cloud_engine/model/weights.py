"""Weights into a model: from a Hugging Face folder (safetensors, single or sharded) or from one GGUF file.

Both become a stream of (Hugging Face name, tensor), copied one by one into the fused weights, so that memory peaks at
the model plus one tensor. Names, shapes and completeness are checked; nothing in a checkpoint is ever unpickled.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cloud_engine.engine.config import DType
from cloud_engine.model.config import ModelConfig, from_gguf, from_hugging_face
from cloud_engine.model.llama import Llama
from shared.gguf import ModelInvalid, check

_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DERIVED = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry although the configuration determines them."""


def load_model(path: Path, *, dtype: DType = "float32", device: str = "cpu") -> Llama:
    """Raises ModelInvalid for a damaged or incomplete checkpoint, UnsupportedModel for one of another kind."""
    if path.is_file():
        check(path)
        reader = gguf.GGUFReader(path)
        config = _gguf_config(reader)
        stream = _gguf_tensors(reader, config)
    else:
        config = from_hugging_face(read_json(path / "config.json"))
        stream = _safetensors(path, tied=config.tied)
    like = torch.empty(0, dtype=getattr(torch, dtype), device=device)
    model = Llama(config, lambda outputs, inputs: like.new_empty(outputs, inputs))
    _fill(model, stream)
    return model


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelInvalid(f"{path.name} is missing or not JSON", param="model") from error
    if not isinstance(value, dict):
        raise ModelInvalid(f"{path.name} is not a JSON object", param="model")
    return value


def _fill(model: Llama, stream: Iterable[tuple[str, Tensor]]) -> None:
    places = model.destinations()
    for name, tensor in stream:
        if name.endswith(_DERIVED):
            continue
        place = places.pop(name, None)
        if place is None:
            raise ModelInvalid(f"tensor {name} is unknown or comes twice", param="model")
        if place.shape != tensor.shape:
            raise ModelInvalid(f"tensor {name} is {list(tensor.shape)}, not {list(place.shape)}", param="model")
        place.copy_(tensor)
    if places:
        raise ModelInvalid(f"{len(places)} tensors are missing, the first is {min(places)}", param="model")


def _safetensors(folder: Path, *, tied: bool) -> Iterator[tuple[str, Tensor]]:
    for shard in _shards(folder):
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if not (tied and name == "lm_head.weight"):
                        yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelInvalid(f"{shard.name}: {error}", param="model") from error


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelInvalid("model.safetensors.index.json has no weight_map", param="model")
    names = sorted({str(name) for name in weight_map.values()})
    if any(Path(name).name != name for name in names):
        raise ModelInvalid("model.safetensors.index.json names a file outside its folder", param="model")
    return [folder / name for name in names]


def _gguf_config(reader: Any) -> ModelConfig:
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ModelInvalid("tensor token_embd.weight is missing", param="model")
    factors = tensors.get("rope_freqs.weight")
    return from_gguf(
        metadata,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        tied="output.weight" not in tensors,
        rope_factors=() if factors is None else tuple(float(value) for value in factors.data),
    )


def _gguf_tensors(reader: Any, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for entry in reader.tensors:
        if entry.name == "rope_freqs.weight":
            continue
        name = _hugging_face_name(entry.name)
        tensor = torch.tensor(gguf.dequantize(entry.data, entry.tensor_type))
        if name.endswith("q_proj.weight"):
            tensor = _unpermuted(tensor, config.num_heads)
        elif name.endswith("k_proj.weight"):
            tensor = _unpermuted(tensor, config.num_kv_heads)
        yield name, tensor


def _hugging_face_name(name: str) -> str:
    outer = _GGUF_OUTER.get(name.removesuffix(".weight"))
    if outer:
        return f"{outer}.weight"
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _GGUF_LAYER and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_GGUF_LAYER[parts[2]]}.weight"
    return name


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """GGUF stores rotary pairs of q and k side by side (i, i + 1); we pair (i, i + D/2), as Hugging Face does."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
