from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from tiny_bert import write_tiny_bert

from edge_agent.embedding.bert import BertConfig, bert_graph
from edge_agent.embedding.tensors import read_tensors
from shared.gguf import ModelInvalid

IDS = np.array([[2, 5, 9, 11, 7, 3], [2, 30, 3, 0, 0, 0], [2, 8, 8, 12, 3, 0]])
MASK = (IDS != 0).astype(np.int64)


def loaded(folder: Path) -> tuple[BertConfig, dict[str, np.ndarray]]:
    config = msgspec.json.decode((folder / "config.json").read_bytes(), type=BertConfig)
    return config, read_tensors(folder / "model.safetensors")


def vectors(folder: Path, *, int8: bool, ids: np.ndarray = IDS, mask: np.ndarray = MASK) -> np.ndarray:
    data = bert_graph(*loaded(folder), int8=int8).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def test_float32_is_what_the_reference_computes(tmp_path: Path) -> None:
    """transformers' own BERT, mean over the mask, length 1: the same numbers."""
    model = write_tiny_bert(tmp_path)
    mask = torch.tensor(MASK)
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor(IDS), attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = torch.nn.functional.normalize(mean, dim=1).numpy()
    np.testing.assert_allclose(vectors(tmp_path, int8=False), expected, atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_int8_is_close_and_smaller(tmp_path: Path, seed: int) -> None:
    """A cosine of at least 0.99 for every text, from a third of the bytes."""
    write_tiny_bert(tmp_path, seed=seed, width=128)
    config, weights = loaded(tmp_path)
    sizes = [bert_graph(config, weights, int8=int8).ByteSize() for int8 in (True, False)]
    assert sizes[0] < sizes[1] / 3
    cosine = (vectors(tmp_path, int8=True) * vectors(tmp_path, int8=False)).sum(1)
    assert cosine.min() >= 0.99


def test_int8_does_not_depend_on_the_neighbours(tmp_path: Path) -> None:
    """A text alone and among others, padded: the same vector, since each token is quantized by itself."""
    write_tiny_bert(tmp_path)
    together = vectors(tmp_path, int8=True)
    for row, vector in enumerate(together):
        length = MASK[row].sum()
        alone = vectors(tmp_path, int8=True, ids=IDS[row : row + 1, :length], mask=MASK[row : row + 1, :length])
        np.testing.assert_allclose(alone[0], vector, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"}, {"hidden_act": "relu"}, {"hidden_size": 30}, {"hidden_size": 1 << 40},
        {"num_hidden_layers": 0}, {"vocab_size": -1}, {"layer_norm_eps": 0.0}, {"intermediate_size": 65},
        {"num_hidden_layers": 3}, {"max_position_embeddings": 33},
    ],
)  # fmt: skip
def test_another_kind_of_model_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    """A configuration that is not BERT's, cannot be, or does not fit the weights: ModelInvalid, by name."""
    write_tiny_bert(tmp_path)
    config, weights = loaded(tmp_path)
    with pytest.raises(ModelInvalid):
        bert_graph(msgspec.structs.replace(config, **change), weights, int8=True)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """NaN would make every vector NaN."""
    write_tiny_bert(tmp_path)
    config, weights = loaded(tmp_path)
    name = "encoder.layer.0.output.dense.weight"
    broken = weights[name].copy()
    broken[0, 0] = np.nan
    with pytest.raises(ModelInvalid, match=name):
        bert_graph(config, weights | {name: broken}, int8=True)
