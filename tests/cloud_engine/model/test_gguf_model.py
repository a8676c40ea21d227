import gguf
import pytest
import tiny_models
import torch

from cloud_engine.model import gemma3
from cloud_engine.model.config import LayerKind, Rope
from cloud_engine.model.weights import load_model

GEMMA = {"layer_types": None, "num_hidden_layers": 6, "query_pre_attn_scalar": 20}
MODELS = {
    "qwen2": ("qwen2", {"num_hidden_layers": 2}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "gemma3, window": ("gemma3", GEMMA),
}


def write(path, model, architecture: str, **numbers: float):
    """As llama.cpp's converter does: the gguf package's names, rotary pairs as they are, Gemma's norms as factors."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture != "qwen2":
        writer.add_key_length(config.head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    for key, number in numbers.items():
        writer.add_float32(f"{architecture}.{key}", number)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shift = architecture == "gemma3" and name.endswith("norm.weight")
        array = (tensor + 1 if shift else tensor).contiguous().numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(tmp_path, name):
    """A GGUF file of each family, named by the gguf package, gives the logits of the model it was made from."""
    architecture, changes = MODELS[name]
    oracle = tiny_models.make(name, **changes)
    path = write(tmp_path / "m.gguf", oracle, architecture)
    tokens = torch.randint(3, 259, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(tiny_models.logits_of(path, tokens), expected, atol=2e-4, rtol=2e-4)


def test_gemmas_frequencies_are_read_where_they_are_written(tmp_path):
    """The local base frequency may be in the file; without it, it is Gemma's usual one."""
    oracle = tiny_models.make("gemma3, window", **GEMMA)
    usual = load_model(write(tmp_path / "a.gguf", oracle, "gemma3")).config
    said = load_model(write(tmp_path / "b.gguf", oracle, "gemma3", **{"rope.freq_base_swa": 50.0})).config
    full = LayerKind(Rope(1e6))
    assert usual.layers == (LayerKind(Rope(1e4), tiny_models.WINDOW),) * 5 + (full,)
    assert said.layers == (LayerKind(Rope(50.0), tiny_models.WINDOW),) * 5 + (full,)


def test_the_one_other_attention_scale_is_known():
    """Gemma 3 27B scales by its hidden size per head, which GGUF does not say; the others by their head dimension."""
    fields = {
        "vocab_size": 10,
        "hidden_size": 5376,
        "intermediate_size": 10,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "max_position_embeddings": 100,
        "sliding_window": 10,
    }
    assert gemma3.read_config(fields | {"num_hidden_layers": 62}).query_scale == pytest.approx((128 / 168) ** 0.5)
    assert gemma3.read_config(fields | {"num_hidden_layers": 48}).query_scale == 1
