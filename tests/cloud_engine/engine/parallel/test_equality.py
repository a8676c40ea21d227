"""Divided over ranks, a model computes what it computes in one piece, and what transformers computes."""

import random

import pytest
import tiny_llama
import tiny_models
import tiny_ranks
import torch

from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.engine import Engine
from cloud_engine.model.division import Division
from shared.schemas import Sampling

GREEDY = Sampling(temperature=0, max_tokens=10, ignore_eos=True)
PROMPT = [Chunk(tokens=list(range(3, 43)), start=0, table=list(range(1, 11)), sampled=40)]
DIVISIONS = {
    "tp2": Division(tensor=2),
    "tp4": Division(tensor=4),
    "pp2": Division(pipeline=2),
    "tp2 x pp2": Division(tensor=2, pipeline=2),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with tiny_ranks.threads(tmp_path_factory.mktemp("ranks")) as made:
        yield made


def prompts() -> list[list[int]]:
    rng = random.Random(7)
    trunk = [rng.randrange(3, 259) for _ in range(14)]
    tails = [[rng.randrange(3, 259) for _ in range(length)] for length in (1, 3, 25)]
    return [*(trunk + tail for tail in tails), tails[0], tails[1], trunk]


def generate(engine: Engine) -> list[list[int]]:
    sequences = [engine.add(str(index), prompt, GREEDY) for index, prompt in enumerate(prompts())]
    while engine.has_work:
        engine.step()
    return [sequence.output for sequence in sequences]


def greedy(oracle) -> list[list[int]]:
    return [tiny_llama.naive_greedy(prompt, GREEDY.max_tokens, oracle) for prompt in prompts()]


def oracle_logits(oracle) -> torch.Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([PROMPT[0].tokens])).logits[0]


@pytest.mark.parametrize("name", tiny_models.VARIANTS)
def test_two_ranks_equal_transformers(tmp_path, ranks, name):
    """Every family over two ranks: the logits of a prompt, and greedy tokens through chunks, hits and preemption."""
    oracle = tiny_models.make(name)
    oracle.save_pretrained(tmp_path)
    both = ranks.load(tmp_path, DIVISIONS["tp2"])
    torch.testing.assert_close(both.run(PROMPT), oracle_logits(oracle), atol=2e-4, rtol=2e-4)
    engine = Engine(both)
    assert generate(engine) == greedy(oracle)
    counters = engine.scheduler.counters
    assert min(counters.prefix_hit_tokens, counters.chunks, counters.preemptions) > 0


@pytest.mark.parametrize("division", DIVISIONS)
def test_any_division_equals_transformers(tiny_model, ranks, division):
    """Llama over 2 and 4 ranks (with 4, two have the same KV head each), 2 stages, and 2 stages of 2 ranks; the
    vocabulary of 259 is divisible by none of them."""
    divided = ranks.load(tiny_model, DIVISIONS[division])
    logits = divided.run(PROMPT)
    assert logits.shape == (40, 259)
    torch.testing.assert_close(logits, oracle_logits(tiny_llama.oracle()), atol=2e-4, rtol=2e-4)
    assert generate(Engine(divided)) == greedy(tiny_llama.oracle())


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe, normalised"])
@pytest.mark.parametrize("count", [2, 4])
def test_whole_experts_over_ranks_equal_transformers(tmp_path, ranks, name, count):
    """Six experts, three to a rank, or one and two: what the experts of all ranks give is summed; a dense layer among
    them is divided by columns."""
    oracle = tiny_models.make(name)
    oracle.save_pretrained(tmp_path)
    divided = ranks.load(tmp_path, Division(tensor=count, experts=True))
    held = [len(runner.model.layers[0].mlp.held) for runner in divided.runners]
    assert sorted(held) == ([3, 3] if count == 2 else [1, 1, 2, 2])
    torch.testing.assert_close(divided.run(PROMPT), oracle_logits(oracle), atol=2e-4, rtol=2e-4)
    assert generate(Engine(divided)) == greedy(oracle)


@pytest.mark.parametrize("name", ["gemma3, window", "qwen3 moe, normalised"])
def test_stages_equal_transformers(tmp_path, ranks, name):
    """Layers that differ keep their own kind in a later stage, and a tied embedding is at both ends."""
    oracle = tiny_models.make(name)
    oracle.save_pretrained(tmp_path)
    divided = ranks.load(tmp_path, DIVISIONS["tp2 x pp2"])
    torch.testing.assert_close(divided.run(PROMPT), oracle_logits(oracle), atol=2e-4, rtol=2e-4)
    assert generate(Engine(divided)) == greedy(oracle)


def test_three_stages_and_steps_without_logits(tmp_path, ranks):
    """A middle stage has neither embedding nor head; a step that wants no logits passes through all the same."""
    oracle = tiny_llama.llama(num_hidden_layers=5)
    oracle.save_pretrained(tmp_path)
    divided = ranks.load(tmp_path, Division(pipeline=3))
    assert [runner.model.config.num_layers for runner in divided.runners] == [1, 2, 2]
    assert [len(runner.model.stage.embedding) for runner in divided.runners] == [259, 0, 0]
    tokens, table = PROMPT[0].tokens, PROMPT[0].table
    assert divided.run([Chunk(tokens[:25], 0, table, 0)]).shape == (0, 259)
    rest = divided.run([Chunk(tokens[25:], 25, table, 15)])
    torch.testing.assert_close(rest, oracle_logits(oracle)[25:], atol=2e-4, rtol=2e-4)


def test_a_vocabulary_smaller_than_its_parts(tmp_path, ranks):
    """Nine tokens over four ranks are three each, so one rank has padding only; no padding is ever seen."""
    oracle = tiny_llama.llama(vocab_size=9)
    oracle.save_pretrained(tmp_path)
    divided = ranks.load(tmp_path, Division(tensor=4))
    assert [len(runner.model.embedding) for runner in divided.runners] == [3] * 4
    tokens = [index % 9 for index in range(12)]
    logits = divided.run([Chunk(tokens, 0, [1, 2, 3], 12)])
    with torch.inference_mode():
        torch.testing.assert_close(logits, oracle(torch.tensor([tokens])).logits[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("options", [{"async_depth": 1}, {"host_blocks": 60}])
def test_options_change_no_token(tiny_model, ranks, options):
    """Steps launched ahead, tiles of one size, prefixes that each rank keeps its part of in host memory."""
    engine = Engine(ranks.load(tiny_model, DIVISIONS["tp2"], **options))
    wanted = greedy(tiny_llama.oracle())
    assert [generate(engine) for _ in range(2)] == [wanted] * 2
    engine.close()
    assert bool(engine.stats().swapped_in_blocks) == ("host_blocks" in options)


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"kv_dtype": "fp8"}])
def test_rounding_is_no_worse_over_ranks(tiny_model, ranks, options):
    """int8 weights are rounded part by part, FP8 scales are found by all ranks at once, each for its own heads."""
    exact = oracle_logits(tiny_llama.oracle())
    errors = {
        name: (ranks.load(tiny_model, division, **options).run(PROMPT) - exact).pow(2).mean().sqrt().item()
        for name, division in (DIVISIONS | {"whole": Division()}).items()
    }
    assert 0 < max(errors.values()) < 1.5 * errors["whole"] < 0.5 * exact.std().item()
