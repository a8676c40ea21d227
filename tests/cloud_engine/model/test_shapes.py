import pytest
import torch

from cloud_engine.model.layers import Empty
from cloud_engine.model.registry import HUGGING_FACE
from cloud_engine.model.shapes import SHAPES, find_shape, random_model, step_bytes
from shared.errors import BadRequest

BILLIONS = {"0.6b": 0.6, "8b": 8.2, "30b-a3b": 30.5}


def parameters(name: str) -> int:
    model = HUGGING_FACE[SHAPES[name].architecture].build(
        SHAPES[name].config, Empty(torch.empty(0, device="meta").new_empty)
    )
    return sum(place.target.numel() for place in model.destinations().values())


@pytest.mark.parametrize("name", BILLIONS)
def test_shapes_have_the_size_in_their_name(name):
    """Parameters counted as their makers do, within two hundredths."""
    assert parameters(name) / 1e9 == pytest.approx(BILLIONS[name], rel=0.02)


def test_a_seed_gives_the_same_weights():
    """Twice the same, another seed others; norms are ones, and a row of logits has about unit variance."""
    first, again, other = (random_model(SHAPES["tiny-moe"], seed=seed).destinations() for seed in (1, 1, 2))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert torch.equal(first[name].target, again[name].target)
    assert not torch.equal(first[name].target, other[name].target)
    assert torch.equal(first["model.norm.weight"].target, torch.ones(64))
    assert first[name].target.var().item() == pytest.approx(1 / 64, rel=0.2)


def test_a_step_reads_each_weight_once_and_every_key():
    """In bytes: all weights but the embedding, unless it is the output projection too; keys and values by row."""
    counted = parameters("8b") - 151_936 * 4096
    assert step_bytes(SHAPES["8b"], 1, 0, value_bytes=2, kv_value_bytes=2) == 2 * counted
    assert step_bytes(SHAPES["0.6b"], 1, 0, value_bytes=2, kv_value_bytes=2) == 2 * parameters("0.6b")
    context = step_bytes(SHAPES["8b"], 3, 100, value_bytes=2, kv_value_bytes=1) - 2 * counted
    assert context == 3 * 100 * 2 * 36 * 8 * 128


def test_few_rows_read_few_experts():
    """One row reads 8 of 128 (3.3 billion weights in all, less the embedding), many rows nearly all."""
    billions = [step_bytes(SHAPES["30b-a3b"], rows, 0, value_bytes=1, kv_value_bytes=1) / 1e9 for rows in (1, 8, 512)]
    whole = (parameters("30b-a3b") - 151_936 * 2048) / 1e9
    assert billions[0] == pytest.approx(3.35 - 0.31, rel=0.02)
    assert billions[0] < billions[1] < billions[2] == pytest.approx(whole, rel=1e-6)


def test_an_unknown_shape_is_named_with_what_there_is():
    """As a typed error."""
    with pytest.raises(BadRequest, match=r"0\.6b"):
        find_shape("70b")
