"""Weights into a model: from a Hugging Face folder (safetensors, single or sharded) or from one GGUF file.

Both become a stream of (Hugging Face name, stored tensor), read one by one into the fused weights, so that memory peaks
at the model plus one tensor. Names, shapes and completeness are checked; nothing in a checkpoint is ever unpickled. Of
a model that ranks share, each reads its own part only: safetensors by slices, GGUF tensors dequantized and then cut.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cloud_engine.engine.config import DType
from cloud_engine.model.config import ModelConfig
from cloud_engine.model.decoder import Adapt, Decoder, Family
from cloud_engine.model.division import Share, divide
from cloud_engine.model.gguf_model import GgufModel
from cloud_engine.model.layers import Empty
from cloud_engine.model.registry import GGUF, HUGGING_FACE, configure, find
from shared.gguf import ModelInvalid

_DERIVED = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry although the configuration determines them."""


class Stored(Protocol):
    """A tensor of a checkpoint, not yet read."""

    shape: list[int]

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        """What lies from `start` to `stop` along `dim` (0 or 1)."""


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    family: Family
    config: ModelConfig
    tensors: Iterable[tuple[str, Stored]]
    adapt: Adapt


def read_config(path: Path) -> ModelConfig:
    """The whole model's. Raises as `load_model` does for what can be seen without reading tensors."""
    return _open(path).config


def load_model(path: Path, *, dtype: DType = "float32", device: str = "cpu", share: Share | None = None) -> Decoder:
    """The model, or one rank's `share` of it. Raises ModelInvalid for a damaged or incomplete checkpoint,
    UnsupportedModel for one of another kind or that cannot be divided so."""
    checkpoint = _open(path)
    family, config = checkpoint.family, checkpoint.config
    like = torch.empty(0, dtype=getattr(torch, dtype), device=device)
    if share is None:
        model = whole = family.build(config, Empty(like.new_empty))
    else:
        part = divide(config, share.division, share.rank)
        model = family.build(part, Empty(like.new_empty, share.peers))
        whole = family.build(config, Empty(like.to("meta").new_empty))
    _fill(model, whole, checkpoint.tensors, checkpoint.adapt)
    return model


def _open(path: Path) -> _Checkpoint:
    if path.is_file():
        file = GgufModel(path)
        family = find(GGUF, file.architecture)
        config = configure(family, file.fields, "GGUF metadata")
        return _Checkpoint(family, config, file.tensors(family.gguf_names), family.from_gguf)
    raw = read_json(path / "config.json")
    family = find(HUGGING_FACE, (raw.get("architectures") or ["none"])[0])
    config = configure(family, raw, "config.json")
    return _Checkpoint(family, config, _safetensors(path, tied=config.tied), family.from_safetensors)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelInvalid(f"{path.name} is missing or not JSON", param="model") from error
    if not isinstance(value, dict):
        raise ModelInvalid(f"{path.name} is not a JSON object", param="model")
    return value


def _fill(model: Decoder, whole: Decoder, stream: Iterable[tuple[str, Stored]], adapt: Adapt) -> None:
    """All of `whole` must be there, although `model` may need only a part."""
    shapes = {name: list(place.target.shape) for name, place in whole.destinations().items()}
    places = model.destinations()
    for name, stored in stream:
        if name.endswith(_DERIVED):
            continue
        shape = shapes.pop(name, None)
        if shape is None:
            raise ModelInvalid(f"tensor {name} is unknown or comes twice", param="model")
        if shape != stored.shape:
            raise ModelInvalid(f"tensor {name} is {stored.shape}, not {shape}", param="model")
        if place := places.get(name):
            tensor = stored.read(place.dim, place.start, place.stop)
            place.target.copy_(adapt(model.config, name, tensor))
    if shapes:
        raise ModelInvalid(f"{len(shapes)} tensors are missing, the first is {min(shapes)}", param="model")


class _Slices:
    """A tensor in a safetensors file."""

    def __init__(self, inside: Any) -> None:
        self._inside = inside
        self.shape = list(inside.get_shape())

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        tensor: Tensor = self._inside[:, start:stop] if dim else self._inside[start:stop]
        return tensor


def _safetensors(folder: Path, *, tied: bool) -> Iterator[tuple[str, Stored]]:
    for shard in _shards(folder):
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if not (tied and name == "lm_head.weight"):
                        yield name, _Slices(file.get_slice(name))
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
