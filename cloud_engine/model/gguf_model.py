"""A GGUF file under Hugging Face's names: metadata as the fields of a `config.json`, tensors dequantized."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from cloud_engine.model.config import Raw
from shared.gguf import ModelInvalid, check

_FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.dimension_count": "rotary_dim",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "expert_count": "num_local_experts",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_FACTORS = "rope_freqs.weight"


class GgufModel:
    """Raises ModelInvalid for a file that is not sound."""

    def __init__(self, path: Path) -> None:
        check(path)
        self._reader: Any = gguf.GGUFReader(path)
        metadata = {
            name: entry.contents() for name, entry in self._reader.fields.items() if not name.startswith("tokenizer.")
        }
        self.architecture = metadata.get("general.architecture")
        prefix = f"{self.architecture}."
        self.fields = self._fields(
            {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
        )

    def tensors(self, names: Mapping[str, str]) -> Iterator[tuple[str, "GgufTensor"]]:
        """All but the rotary factors; `names` are those of layer tensors that differ from Llama's."""
        layer = _LAYER | dict(names)
        for entry in self._reader.tensors:
            if entry.name != _FACTORS:
                yield _hugging_face_name(entry.name, layer), GgufTensor(entry)

    def _fields(self, metadata: Mapping[str, Any]) -> Raw:
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        if "token_embd.weight" not in tensors:
            raise ModelInvalid("tensor token_embd.weight is missing", param="model")
        fields = {name: metadata[key] for key, name in _FIELDS.items() if key in metadata}
        fields["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
        fields["tie_word_embeddings"] = "output.weight" not in tensors
        fields["rope_scaling"] = {
            "type": metadata.get("rope.scaling.type", "none"),
            "factor": metadata.get("rope.scaling.factor", 1.0),
        }
        if _FACTORS in tensors:
            fields["rope_factors"] = tuple(float(value) for value in tensors[_FACTORS].data)
        return fields


class GgufTensor:
    """A tensor in the file, dequantized when it is read."""

    def __init__(self, entry: Any) -> None:
        self._entry = entry
        self.shape = [int(size) for size in reversed(entry.shape)]

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        """What lies from `start` to `stop` along `dim`. Of a matrix only the rows that are needed are dequantized."""
        data = self._entry.data
        if dim == 0 and data.ndim == 2:
            return torch.tensor(gguf.dequantize(data[start:stop], self._entry.tensor_type))
        return torch.tensor(gguf.dequantize(data, self._entry.tensor_type)).narrow(dim, start, stop - start)


def _hugging_face_name(name: str, layer: Mapping[str, str]) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in layer:
        return f"model.layers.{parts[1]}.{layer[parts[2]]}.{kind}"
    return name
