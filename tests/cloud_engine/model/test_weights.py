import json
import shutil

import gguf
import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cloud_engine.model import weights as loading
from cloud_engine.model.config import UnsupportedModel
from cloud_engine.model.division import Division, Share
from cloud_engine.model.layers import Alone, Destination
from cloud_engine.model.weights import load_model
from shared.gguf import ModelInvalid

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, *, model=None, drop=(), extra=None, quantize=False, **metadata):
    """The tiny model as llama.cpp's converter writes it: its names, and rotary pairs of q and k side by side."""
    model = model or tiny_llama.llama()
    config = model.config
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    for key, value in metadata.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for name, tensor in [*model.state_dict().items(), *(extra or {}).items()]:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:
                tensor = tensor.view(count, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        if (written := gguf_name(name)) in drop:
            continue
        array = tensor.contiguous().numpy()
        if quantize and array.ndim == 2 and array.shape[1] % 32 == 0:
            packed = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(written, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(written, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in outer:
        return f"{outer[stem]}.weight"
    if not name.startswith("model.layers."):
        return name
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{NAMES[part]}.weight"


def weights(path) -> dict[str, torch.Tensor]:
    return {name: place.target.clone() for name, place in load_model(path).destinations().items()}


def test_a_folder_loads_what_was_saved(tiny_model):
    """Each tensor of the checkpoint arrives whole in its part of the fused weights."""
    saved = tiny_llama.llama().state_dict()
    loaded = weights(tiny_model)
    assert loaded.keys() == saved.keys()
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, saved[name], atol=0, rtol=0)


def test_a_sharded_folder_loads_the_same(tiny_model, tmp_path):
    """Shards named by an index are the same as one file."""
    tiny_llama.llama().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    single, sharded = weights(tiny_model), weights(tmp_path)
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_gguf_loads_the_same(tiny_model, tmp_path):
    """A GGUF file in llama.cpp's layout is the same model, bit by bit."""
    single, converted = weights(tiny_model), weights(write_gguf(tmp_path / "m.gguf"))
    assert single.keys() == converted.keys()
    assert all(torch.equal(single[name], converted[name]) for name in single)


def test_gguf_is_dequantized(tmp_path):
    """Quantized tensors come back within the error of their format, the others exactly."""
    model = tiny_llama.llama(hidden_size=64, intermediate_size=96)
    loaded = weights(write_gguf(tmp_path / "q.gguf", model=model, quantize=True))
    errors = {name: (loaded[name] - tensor).abs().max().item() for name, tensor in model.state_dict().items()}
    assert 0 < errors["model.layers.0.self_attn.q_proj.weight"] < 0.01
    assert 0 < errors["model.embed_tokens.weight"] < 0.01
    assert errors["model.norm.weight"] == 0
    assert max(errors.values()) < 0.01


def test_dtype_is_converted_at_load(tiny_model):
    """Weights take the asked dtype."""
    places = load_model(tiny_model, dtype="bfloat16").destinations().values()
    assert {place.target.dtype for place in places} == {torch.bfloat16}


def of_rank(path, rank: int, size: int) -> dict[str, Destination]:
    share = Share(Division(tensor=size), rank, Alone(rank, size))
    return load_model(path, share=share).destinations()


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_all_ranks_are_the_whole(tiny_model, tmp_path, kind, size):
    """Put where they come from, the parts that the ranks load cover each tensor, and nothing differs."""
    path = tiny_model if kind == "safetensors" else write_gguf(tmp_path / "q.gguf", quantize=True)
    whole = weights(path)
    joined = {name: torch.full_like(tensor, torch.nan) for name, tensor in whole.items()}
    for rank in range(size):
        for name, place in of_rank(path, rank, size).items():
            joined[name].narrow(place.dim, place.start, place.stop - place.start).copy_(place.target)
    assert all(torch.equal(joined[name], tensor) for name, tensor in whole.items())


def test_a_rank_reads_its_own_part_only(tiny_model, monkeypatch):
    """What is read of a checkpoint is what the rank keeps: of the other parts, and of other stages, only the shapes."""
    reads: list[int] = []
    read = loading._Slices.read

    def counted(stored, dim, start, stop):
        reads.append((tensor := read(stored, dim, start, stop)).numel())
        return tensor

    monkeypatch.setattr(loading._Slices, "read", counted)
    places = load_model(tiny_model, share=Share(Division(tensor=2, pipeline=2), 3, Alone(1, 2))).destinations()
    assert sum(reads) == sum(place.target.numel() for place in places.values())
    assert sum(reads) < sum(tensor.numel() for tensor in tiny_llama.oracle().state_dict().values()) / 3
    assert {name.split(".")[2] for name in places if "layers" in name} == {"1"}


def test_a_rank_refuses_a_checkpoint_that_lacks_anothers_part(tiny_model, tmp_path):
    """Each rank looks at the names and shapes of all tensors, so that no rank begins while another cannot."""
    broken = shutil.copytree(tiny_model, tmp_path / "copy") / "model.safetensors"
    tensors = load_file(broken)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken)
    with pytest.raises(ModelInvalid, match=r"missing, the first is model\.layers\.1\.mlp\.up_proj"):
        load_model(broken.parent, share=Share(Division(pipeline=2), 0, Alone()))


@pytest.fixture
def copy(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "copy")


def edit(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None}, "none"),
        ({"attention_bias": True}, "attention_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_other_models_are_refused_by_name(copy, changes, named):
    """What would be computed wrongly is not loaded; the error says what is supported or what is in the way."""
    edit(copy, **changes)
    with pytest.raises(UnsupportedModel, match=named):
        load_model(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"vocab_size": -1},
        {"head_dim": 7},
    ],
)
def test_impossible_dimensions_are_refused(copy, changes):
    """Nonsense in config.json is a typed error."""
    edit(copy, **changes)
    with pytest.raises(ModelInvalid):
        load_model(copy)


def test_damaged_checkpoints_are_refused(copy):
    """Missing, additional, misshapen tensors and a cut file are typed errors that name the tensor or the file."""
    file = copy / "model.safetensors"
    tensors = load_file(file)
    first = "model.layers.0.mlp.up_proj.weight"
    for changed, named in (
        ({name: tensor for name, tensor in tensors.items() if name != first}, f"missing, the first is {first}"),
        (tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(4)}, "q_proj.bias is unknown"),
        (tensors | {first: torch.zeros(2, 2)}, r"is \[2, 2\], not \[80, 48\]"),
    ):
        save_file(changed, file)
        with pytest.raises(ModelInvalid, match=named):
            load_model(copy)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelInvalid, match=r"model\.safetensors"):
        load_model(copy)
    file.unlink()
    with pytest.raises(ModelInvalid, match=r"model\.safetensors"):
        load_model(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ModelInvalid, match=r"config\.json"):
        load_model(copy)


def test_an_index_cannot_name_files_elsewhere(copy):
    """Shard names with a path in them are refused."""
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ModelInvalid, match="outside"):
        load_model(copy)


def test_other_ggufs_are_refused(tmp_path):
    """Another architecture, experts, missing tensors, foreign bytes: typed errors."""
    with pytest.raises(UnsupportedModel, match="'gpt2'; supported: llama"):
        load_model(write_gguf(tmp_path / "a.gguf", architecture="gpt2"))
    with pytest.raises(UnsupportedModel, match="experts"):
        load_model(write_gguf(tmp_path / "b.gguf", **{"llama.expert_count": 8}))
    with pytest.raises(UnsupportedModel, match="yarn"):
        load_model(write_gguf(tmp_path / "c.gguf", **{"llama.rope.scaling.type": "yarn"}))
    with pytest.raises(ModelInvalid, match="token_embd"):
        load_model(write_gguf(tmp_path / "d.gguf", drop=("token_embd.weight",)))
    with pytest.raises(ModelInvalid, match=r"missing, the first is model\.layers\.1\.mlp\.up_proj"):
        load_model(write_gguf(tmp_path / "e.gguf", drop=("blk.1.ffn_up.weight",)))
    with pytest.raises(ModelInvalid, match=r"q_proj\.bias is unknown"):
        load_model(write_gguf(tmp_path / "f.gguf", extra={"blk.0.attn_q.bias": torch.zeros(48)}))
    (tmp_path / "g.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelInvalid):
        load_model(tmp_path / "g.gguf")


@pytest.mark.model
def test_real_gguf_equals_its_safetensors(model_path, tmp_path):
    """The real GGUF loads the same weights as the folder of what transformers dequantizes from it."""
    model = AutoModelForCausalLM.from_pretrained(
        str(model_path.parent), gguf_file=model_path.name, dtype=torch.float32, local_files_only=True
    )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": None}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    ours, theirs = load_model(model_path), load_model(tmp_path)
    assert ours.config == theirs.config
    for name, place in ours.destinations().items():
        same = theirs.destinations()[name].target
        torch.testing.assert_close(place.target, same, atol=1e-7, rtol=1e-6, msg=name)
