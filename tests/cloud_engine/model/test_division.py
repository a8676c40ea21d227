import pytest
import tiny_models

from cloud_engine.model.config import ModelConfig, UnsupportedModel
from cloud_engine.model.division import Division, divide
from cloud_engine.model.weights import load_model


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> ModelConfig:
    """4 heads, 2 of keys and values, 6 experts of 32 columns, 2 layers."""
    return load_model(tiny_models.save(tmp_path_factory.mktemp("mixtral"), "mixtral")).config


def test_one_rank_has_the_model_itself(mixtral):
    """The default division changes nothing."""
    assert divide(mixtral, Division(), 0) is mixtral


def test_ranks_of_a_stage_are_adjacent(mixtral):
    """Of 2 x 2 ranks, 0 and 1 have the first layer, 2 and 3 the second, each with half of everything in it."""
    parts = [divide(mixtral, Division(tensor=2, pipeline=2), rank) for rank in range(4)]
    assert [part.stage.first_layer for part in parts] == [0, 0, 1, 1]
    assert [(part.stage.begins, part.stage.ends) for part in parts] == [(True, False)] * 2 + [(False, True)] * 2
    assert {(part.num_heads, part.num_kv_heads, part.experts.intermediate_size) for part in parts} == {(2, 1, 16)}
    assert {part.vocab_size for part in parts} == {mixtral.vocab_size}


def test_every_layer_and_expert_is_somewhere_once(mixtral):
    """Uneven numbers are divided as evenly as they can be."""
    layers = [divide(mixtral, Division(pipeline=2), rank).num_layers for rank in range(2)]
    held = [divide(mixtral, Division(tensor=4, experts=True), rank).experts.held for rank in range(4)]
    assert sum(layers) == mixtral.num_layers
    assert [expert for part in held for expert in part or ()] == list(range(6))


@pytest.mark.parametrize(
    ("division", "named", "param"),
    [
        (Division(tensor=3), "4 attention heads .* 3 ranks", "tensor_parallel"),
        (Division(tensor=8), "4 attention heads", "tensor_parallel"),
        (Division(pipeline=3), "2 layers .* 3 stages", "pipeline_parallel"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(mixtral, division, named, param):
    """The error says what does not fit and which option asks for it."""
    with pytest.raises(UnsupportedModel, match=named) as caught:
        divide(mixtral, division, 0)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("changes", "division", "named"),
    [
        ({"intermediate_size": 30}, Division(tensor=4), "30 columns of an expert"),
        (
            {"num_key_value_heads": 3, "num_attention_heads": 6, "hidden_size": 72},
            Division(tensor=2),
            "3 key-value heads",
        ),
        ({"num_local_experts": None, "num_experts_per_tok": None}, Division(tensor=2, experts=True), "no experts"),
    ],
)
def test_odd_shapes_are_refused_by_name(tmp_path, changes, division, named):
    """Columns, KV heads, experts."""
    name = "mixtral" if "no experts" not in named else "qwen2"
    config = load_model(tiny_models.save(tmp_path, name, **changes)).config
    with pytest.raises(UnsupportedModel, match=named):
        divide(config, division, 0)
