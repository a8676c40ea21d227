import pytest
import tiny_llama
import torch
from tiny_models import logits_of

LENGTH = 40
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "no grouping": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(tmp_path, name):
    """Every variant of the family that is accepted gives the logits that transformers gives, in float32."""
    oracle = tiny_llama.llama(**VARIANTS[name])
    oracle.save_pretrained(tmp_path)
    tokens = torch.randint(3, 259, (LENGTH,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits_of(tmp_path, tokens), expected, atol=2e-4, rtol=2e-4)


def test_the_variants_differ(tmp_path):
    """The comparison above is not vacuous: rotary scaling changes the logits."""
    made = []
    for name in ("plain", "linear", "llama3", "theta"):
        tiny_llama.llama(**VARIANTS[name]).save_pretrained(tmp_path / name)
        made.append(logits_of(tmp_path / name, list(range(3, 43))))
    for index, one in enumerate(made):
        assert all((one - other).abs().max() > 0.01 for other in made[:index])
