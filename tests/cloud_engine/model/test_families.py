import json
import random

import pytest
import tiny_llama
import tiny_models
import torch

from cloud_engine.attention import reference
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.runner import Runner
from cloud_engine.model.weights import load_model
from shared.gguf import ModelInvalid
from shared.schemas import Sampling

GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True)


def prompts() -> list[list[int]]:
    """Shorter and longer than the tiny window, most with a common beginning, enough alike to be decoded as a group."""
    rng = random.Random(7)
    trunk = [rng.randrange(3, 259) for _ in range(14)]
    tails = [[rng.randrange(3, 259) for _ in range(length)] for length in (1, 3, 6, 25)]
    return [*(trunk + tail for tail in tails), tails[0], tails[2], trunk]


def generate(engine: Engine, requests: list[list[int]]) -> list[list[int]]:
    sequences = [engine.add(str(index), prompt, GREEDY) for index, prompt in enumerate(requests)]
    while engine.has_work:
        engine.step()
    return [sequence.output for sequence in sequences]


@pytest.mark.parametrize("name", tiny_models.VARIANTS)
def test_logits_equal_transformers(tmp_path, name):
    """Every family, loaded from what transformers saved, gives the logits that transformers gives, in float32."""
    oracle = tiny_models.make(name)
    oracle.save_pretrained(tmp_path)
    tokens = torch.randint(3, 259, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(tiny_models.logits_of(tmp_path, tokens), expected, atol=2e-4, rtol=2e-4)
    packed = tiny_models.logits_of(tmp_path, tokens, lambda model: model.pack())
    torch.testing.assert_close(packed, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", tiny_models.VARIANTS)
def test_greedy_output_equals_transformers(tmp_path, name):
    """Through the engine, in chunks, with prefix hits, preempted and in groups, greedy tokens are transformers' own."""
    oracle = tiny_models.make(name)
    oracle.save_pretrained(tmp_path)
    wanted = [tiny_llama.naive_greedy(prompt, GREEDY.max_tokens, oracle) for prompt in prompts()]
    engine = tiny_llama.engine(tmp_path, max_num_batched_tokens=11, num_blocks=30, model_len=64)
    assert generate(engine, prompts()) == wanted
    assert generate(engine, prompts()) == wanted
    counters = engine.scheduler.counters
    assert min(counters.prefix_hit_tokens, counters.chunks, counters.preemptions) > 0
    plain = Engine(Runner(load_model(tmp_path), engine.config, attend=reference.attend))
    assert generate(plain, prompts()[2:4]) == wanted[2:4]


@pytest.mark.parametrize("name", [name for name in tiny_models.VARIANTS if "window" in name])
def test_the_window_matters(tmp_path, name):
    """The comparison above is not vacuous: without its window the model answers otherwise, but not before it fills."""
    tokens = list(range(3, 43))
    narrow = tiny_models.logits_of(tiny_models.save(tmp_path / "narrow", name), tokens)
    wide = tiny_models.logits_of(tiny_models.save(tmp_path / "wide", name, sliding_window=64), tokens)
    torch.testing.assert_close(narrow[: tiny_models.WINDOW], wide[: tiny_models.WINDOW])
    assert (narrow[tiny_models.WINDOW] - wide[tiny_models.WINDOW]).abs().max() > 0.01


def test_older_gemma_files_say_the_same(tmp_path):
    """A pattern, two base frequencies and a `rope_scaling` are read as the lists and parameters of newer files."""
    name = "gemma3, window, other scale, ropes"
    new = load_model(tiny_models.save(tmp_path, name)).config
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    del fields["layer_types"], fields["rope_parameters"], fields["_sliding_window_pattern"]
    old = {"rope_theta": 900.0, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    file.write_text(json.dumps(fields | old | {"sliding_window_pattern": 2}))
    assert load_model(tmp_path).config == new


def test_half_precision_norms_keep_their_precision(tmp_path):
    """In bfloat16 the factors of Gemma's norms stay float32: near one, bfloat16 has steps of a hundredth."""
    model = load_model(tiny_models.save(tmp_path, "gemma3, window"), dtype="bfloat16")
    kinds = {name.endswith("norm.weight"): place.target.dtype for name, place in model.destinations().items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    config = EngineConfig(model_len=64, num_blocks=30, block_size=4, max_num_batched_tokens=64, dtype="bfloat16")
    assert [len(output) for output in generate(Engine(Runner(model.pack(), config)), prompts()[:2])] == [12, 12]


@pytest.mark.parametrize("changes", [{"num_experts_per_tok": 7}, {"num_local_experts": 0}, {"num_local_experts": None}])
def test_impossible_experts_are_refused(tmp_path, changes):
    """More experts for a token than there are, or none at all: typed errors."""
    file = tiny_models.save(tmp_path, "mixtral") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelInvalid):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "gemma3, window"])
@pytest.mark.parametrize("types", [["chunked_attention"] * 3, ["full_attention"]])
def test_unknown_or_too_few_layer_types_are_refused(tmp_path, name, types):
    """A layer of a type we do not know, or a list that does not cover the layers: typed errors."""
    file = tiny_models.save(tmp_path, name) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_types": types, "num_hidden_layers": 3}))
    with pytest.raises(ModelInvalid, match=r"layer_types|chunked_attention"):
        load_model(tmp_path)
