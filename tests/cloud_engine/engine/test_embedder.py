"""Vectors of the engine against transformers' hidden states, alone and beside requests that generate."""

import random

import pytest
import tiny_llama
import tiny_models
import torch

from cloud_engine.engine.embedder import Job
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.runner import Runner
from cloud_engine.model.weights import load_model
from shared.errors import BadRequest, CausewayError, ContextTooLong, UnsupportedParameter
from shared.schemas import Sampling

GREEDY = Sampling(temperature=0, max_tokens=24, ignore_eos=True)


def texts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 259) for _ in range(length)] for length in (1, 7, 128, 16, 33, 90)]


@torch.inference_mode()
def wanted(tokens: list[int], *, model=None, pooling: str = "mean", dimensions: int | None = None) -> torch.Tensor:
    inner = (model or tiny_llama.oracle()).model
    hidden = inner(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
    return torch.nn.functional.normalize(pooled[:dimensions], dim=0)


def asked(engine: Engine, inputs: list[list[int]], dimensions: int | None = None) -> tuple[Job, list]:
    made: list = []
    job = Job(inputs, made.append, dimensions)
    engine.embedder.add(job)
    return job, made


def run(engine: Engine, limit: int = 2000) -> None:
    for _ in range(limit):
        if not engine.has_work:
            return
        engine.step()
    pytest.fail("the engine never finished")


def close(vectors, expected) -> bool:
    return torch.allclose(torch.tensor(vectors), torch.stack(expected), atol=2e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("changes", [{"max_num_batched_tokens": 512}, {}, {"max_num_batched_tokens": 9},
                                     {"async_depth": 1}, {"deterministic": True}])  # fmt: skip
def test_vectors_equal_those_of_transformers(tiny_model, pooling, changes):
    """Whole, in chunks, several inputs in a step, launched ahead, in tiles: normalised mean or last hidden state."""
    engine = tiny_llama.engine(tiny_model, pooling=pooling, **changes)
    _, made = asked(engine, texts())
    run(engine)
    assert close(made[0], [wanted(tokens, pooling=pooling) for tokens in texts()])
    assert engine.stats().kv_blocks_used == 0
    engine.close()


def test_dimensions_cut_and_normalise_again(tiny_model):
    """The first numbers of a vector, made a vector of length 1."""
    engine = tiny_llama.engine(tiny_model)
    _, made = asked(engine, texts(), dimensions=10)
    run(engine)
    assert close(made[0], [wanted(tokens, dimensions=10) for tokens in texts()])


def test_windows_and_scaled_embeddings(tmp_path):
    """Gemma 3: sliding windows, an embedding that is scaled, a norm of its own."""
    name = "gemma3, window"
    path, model = tiny_models.save(tmp_path, name), tiny_models.make(name)
    small = tiny_llama.engine(path, max_num_batched_tokens=9)
    _, made = asked(small, texts()[:2])
    run(small)
    assert close(made[0], [wanted(tokens, model=model) for tokens in texts()[:2]])


@pytest.mark.parametrize("blocks", [40, 200])
def test_who_generates_meanwhile_is_not_disturbed(tiny_model, blocks):
    """Tokens beside embeddings are those without, in every step in between; so are the vectors. Also while blocks are
    short: then texts wait, and so do requests, but all end."""
    prompts = texts()[1:2] + texts()[3:5] + texts()[5:]
    engine = tiny_llama.engine(tiny_model, num_blocks=blocks, max_num_batched_tokens=16)
    running = [engine.add(str(at), prompt, GREEDY) for at, prompt in enumerate(prompts)]
    made = [asked(engine, texts())[1] for _ in range(2)]
    together = 0
    while engine.has_work:
        before = engine.stats()
        outputs = engine.step()
        together += bool(outputs) and engine.stats().embedded_tokens > before.embedded_tokens
        assert engine.stats().embedded_tokens - before.embedded_tokens <= 16
    assert [one.output for one in running] == [tiny_llama.naive_greedy(prompt, 24) for prompt in prompts]
    assert all(close(vectors, [wanted(tokens) for tokens in texts()]) for [vectors] in made)
    assert together > 1
    assert engine.stats().kv_blocks_used == 0


def test_evicted_prefixes_are_saved_before_they_are_written_over(tiny_model):
    """Blocks that an input takes from the prefix cache go on in host memory, unharmed."""
    engine = tiny_llama.engine(tiny_model, num_blocks=34, host_blocks=40)
    prompt = texts()[5]
    first = engine.add("a", prompt, GREEDY)
    run(engine)
    _, made = asked(engine, texts()[2:3])
    run(engine)
    again = engine.add("b", prompt, GREEDY)
    run(engine)
    assert again.output == first.output == tiny_llama.naive_greedy(prompt, 24)
    assert engine.stats().prefix_host_hit_tokens > 60
    assert close(made[0], [wanted(texts()[2])])


def test_a_cancelled_job_stops_and_gives_its_blocks_back(tiny_model):
    """In the middle of an input, and one that waits; another goes on."""
    engine = tiny_llama.engine(tiny_model, max_num_batched_tokens=8)
    (gone, never), (waits, nor), (_, made) = (asked(engine, texts()[2:]) for _ in range(3))
    engine.step()
    assert engine.stats().kv_blocks_used == 32
    gone.cancelled = waits.cancelled = True
    run(engine)
    assert (never, nor) == ([], [])
    assert engine.stats().embedded_tokens == 8 + sum(map(len, texts()[2:]))
    assert close(made[0], [wanted(tokens) for tokens in texts()[2:]])
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize(
    ("inputs", "dimensions", "error", "param"),
    [
        ([[5], []], None, BadRequest, "input[1]"),
        ([[5] * 129], None, ContextTooLong, "input[0]"),
        ([[5, 259]], None, BadRequest, "input[0]"),
        ([[5]], 49, BadRequest, "dimensions"),
        ([[5]], 0, BadRequest, "dimensions"),
    ],
)
def test_bad_input_is_refused_by_name(tiny_model, inputs, dimensions, error: type[CausewayError], param):
    """Nothing is queued for it."""
    engine = tiny_llama.engine(tiny_model)
    with pytest.raises(error) as refused:
        asked(engine, inputs, dimensions)
    assert refused.value.param == param
    assert not engine.has_work


def test_a_model_in_parts_says_that_it_has_none(tiny_model):
    """With several ranks no process sees all hidden states of all stages: a typed error, before anything is queued."""

    class Part(Runner):
        embeds = False

    engine = Engine(Part(load_model(tiny_model), tiny_llama.engine(tiny_model).config))
    with pytest.raises(UnsupportedParameter):
        asked(engine, [[5]])
    assert not engine.has_work
