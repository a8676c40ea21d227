"""Weights into a model: from a Hugging Face folder (safetensors, single or sharded) or from one GGUF file.

Both become a stream of (Hugging Face name, tensor), copied one by one into the fused weights, so that memory peaks at
the model plus one tensor. Names, shapes and completeness are checked; nothing in a checkpoint is ever unpickled.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cloud_engine.engine.config import DType
from cloud_engine.model.decoder import Adapt, Decoder
from cloud_engine.model.gguf_model import GgufModel
from cloud_engine.model.registry import GGUF, HUGGING_FACE, configure, find
from shared.gguf import ModelInvalid

_DERIVED = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry although the configuration determines them."""


def load_model(path: Path, *, dtype: DType = "float32", device: str = "cpu") -> Decoder:
    """Raises ModelInvalid for a damaged or incomplete checkpoint, UnsupportedModel for one of another kind."""
    if path.is_file():
        file = GgufModel(path)
        family = find(GGUF, file.architecture)
        config = configure(family, file.fields, "GGUF metadata")
        stream, adapt = file.tensors(family.gguf_names), family.from_gguf
    else:
        raw = read_json(path / "config.json")
        family = find(HUGGING_FACE, (raw.get("architectures") or ["none"])[0])
        config = configure(family, raw, "config.json")
        stream, adapt = _safetensors(path, tied=config.tied), family.from_safetensors
    like = torch.empty(0, dtype=getattr(torch, dtype), device=device)
    model = family.build(config, lambda outputs, inputs: like.new_empty(outputs, inputs))
    _fill(model, stream, adapt)
    return model


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelInvalid(f"{path.name} is missing or not JSON", param="model") from error
    if not isinstance(value, dict):
        raise ModelInvalid(f"{path.name} is not a JSON object", param="model")
    return value


def _fill(model: Decoder, stream: Iterable[tuple[str, Tensor]], adapt: Adapt) -> None:
    places = model.destinations()
    for name, tensor in stream:
        if name.endswith(_DERIVED):
            continue
        place = places.pop(name, None)
        if place is None:
            raise ModelInvalid(f"tensor {name} is unknown or comes twice", param="model")
        if place.shape != tensor.shape:
            raise ModelInvalid(f"tensor {name} is {list(tensor.shape)}, not {list(place.shape)}", param="model")
        place.copy_(adapt(model.config, name, tensor))
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
