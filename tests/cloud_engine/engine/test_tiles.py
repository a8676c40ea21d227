"""The deterministic mode: a request's log probabilities are the same to the last bit, whatever is beside it."""

import random
from pathlib import Path

import pytest
import tiny_llama
import tiny_models
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cloud_engine.attention import invariant, reference
from cloud_engine.attention.batch import AttentionBatch, span
from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig, Quantization
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.runner import Runner
from cloud_engine.engine.sampler import Sampled
from cloud_engine.engine.tiles import ROWS, tiles
from cloud_engine.model.weights import load_model
from shared.schemas import Sampling

NEEDLE = [7 * index % 251 + 3 for index in range(45)]
SAMPLING = Sampling(temperature=0.7, seed=3, max_tokens=14, ignore_eos=True, logprobs=5)
FAMILIES = ["llama", "gemma3, window", "qwen3, window", "mixtral, window", "qwen3 moe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request) -> Path:
    where = tmp_path_factory.mktemp("family")
    return tiny_llama.save(where) if request.param == "llama" else tiny_models.save(where, request.param)


def engine(folder: Path, *, packed: Quantization | None = None, **changes) -> Engine:
    """Of weights as they are loaded, or packed."""
    values = {
        "model_len": 96,
        "num_blocks": 200,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "free_rows": 16,
        "drafting": True,
        "deterministic": True,
    }
    model = load_model(folder)
    return Engine(Runner(model if packed is None else model.pack(packed), EngineConfig(**(values | changes))))


def run(engine: Engine, others: int = 0, seed: int = 0) -> list[Sampled]:
    """All that is known of the needle's tokens, in a crowd of other requests that come and go."""
    rng, outputs = random.Random(seed), []
    for number in range(others):
        prompt = [rng.randrange(3, 200) for _ in range(rng.randrange(1, 40))]
        engine.add(f"o{number}", prompt, Sampling(temperature=0, max_tokens=rng.randrange(4, 30), ignore_eos=True))
        if rng.random() < 0.5:
            engine.step()
    needle = engine.add("needle", NEEDLE, SAMPLING)
    while engine.has_work:
        outputs += [output.sampled for output in engine.step() if output.sequence is needle]
    return outputs


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_nothing_beside_a_request_changes_a_bit(folder):
    """Alone, in random crowds, chunked, with a cached prefix, preempted, drafted for: equal log probabilities."""
    alone = run(engine(folder, drafting=False))
    assert len(alone) == SAMPLING.max_tokens
    assert run(engine(folder), others=7) == alone
    chunked = engine(folder, max_num_batched_tokens=9)
    assert run(chunked, others=5, seed=2) == alone
    assert chunked.scheduler.counters.chunks > 0
    cached = engine(folder)
    run(cached)
    assert run(cached, others=3, seed=3) == alone
    assert cached.stats().prefix_hit_tokens > 0
    crowded = engine(folder, num_blocks=32, prefix_caching=False)
    assert run(crowded, others=7, seed=4) == alone
    assert crowded.stats().preemptions > 0


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_cache_of_8_bits_changes_nothing_of_that(folder):
    """What is read back from an FP8 cache is the same for everybody too."""
    fp8 = {"kv_dtype": "fp8", "kv_scales": ((0.5, 0.25), (0.5, 0.25))}
    alone = run(engine(folder, drafting=False, **fp8))
    assert run(engine(folder, max_num_batched_tokens=9, **fp8), others=6) == alone
    assert alone != run(engine(folder, drafting=False))


@pytest.mark.parametrize("packed", ["none", "int8"])
@pytest.mark.parametrize("folder", ["llama", "qwen3 moe"], indirect=True)
def test_packed_weights_keep_it(folder, packed):
    """The products of weights in this processor's own order, exact and quantized, are as independent of the rest."""
    alone = run(engine(folder, drafting=False, packed=packed))
    assert run(engine(folder, max_num_batched_tokens=9, packed=packed), others=6) == alone


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_drafts_change_no_bit(folder):
    """A step with right and wrong drafts gives the log probabilities of steps without."""
    plain, drafted = engine(folder, drafting=False), engine(folder, drafting=False)
    alone = run(plain)
    needle, outputs = drafted.add("needle", NEEDLE, SAMPLING), []
    while drafted.has_work:
        if needle.num_output:
            rest = [item.token for item in alone[needle.num_output :]]
            needle.draft = (*rest[:3], 1, 2)
        outputs += [output.sampled for output in drafted.step()]
    assert outputs == alone
    assert 0 < drafted.stats().accepted_tokens < drafted.stats().drafted_tokens


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_without_the_mode_bits_do_change(folder):
    """The tests above are not vacuous: the same crowds do change last bits where the mode is off."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 48), torch.randn(ROWS, 48)
    if all(torch.equal(F.linear(x[:rows], weight), F.linear(x, weight)[:rows]) for rows in (1, 2, 4, 8)):
        pytest.skip("this machine's matrix products do not depend on the number of rows")
    alone = run(engine(folder, deterministic=False, drafting=False))
    assert any(run(engine(folder, deterministic=False), others=7, seed=seed) != alone for seed in range(3))


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_the_text_is_the_right_one(folder):
    """Greedy decoding gives the tokens of the naive loop."""
    sequence = (made := engine(folder)).add("a", NEEDLE, Sampling(temperature=0, max_tokens=20, ignore_eos=True))
    while made.has_work:
        made.step()
    assert sequence.output == tiny_llama.naive_greedy(NEEDLE, 20)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 90), st.integers(0, 90)), max_size=6))
def test_a_step_is_cut_into_parts_of_one_size(shapes):
    """In order, nothing lost, and each wanted row's logits are wanted once."""
    chunks = [Chunk(list(range(count)), start, [1], min(sampled, count)) for start, count, sampled in shapes]
    parts = list(tiles(chunks))
    sizes = [sum(chunk.count for chunk in part) for part in parts]
    assert sizes[:-1] == [ROWS] * (len(sizes) - 1)
    assert all(0 < size <= ROWS for size in sizes)

    def rows(listed):
        return [
            (chunk.start + at, token, at >= chunk.count - chunk.sampled)
            for chunk in listed
            for at, token in enumerate(chunk.tokens)
        ]

    assert rows([chunk for part in parts for chunk in part]) == rows(chunks)


@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("size", [3, 16])
def test_the_kernel_equals_the_reference(window, size):
    """Chunks, decodes, windows and blocks that do not fit the problems, NaN in every slot that is not written."""
    torch.manual_seed(0)
    lengths, device = [(1, 1), (5, 21), (40, 40), (1, 64), (20, 53)], torch.device("cpu")
    slots, spans, parts, first = [], [], [], 1
    for count, context in lengths:
        table = list(range(first, first + -(-context // size)))[::-1]
        first += len(table)
        spans.append(span(len(slots), count, context, table, size, device, window))
        parts += invariant.tiles(len(slots), context - count, context, table, size, device, window)
        slots += [table[at // size] * size + at % size for at in range(context - count, context)]
    cache = torch.randn(2, first, size, 2, 12)
    for (_, context), at in zip(lengths, spans, strict=True):
        last = at.blocks.stop - 1 if isinstance(at.blocks, slice) else int(at.blocks[-1])
        cache[:, last, (context - 1) % size + 1 :] = torch.nan
    cache[:, 0] = torch.nan
    q, k, v = torch.randn(len(slots), 4, 12), torch.randn(len(slots), 2, 12), torch.randn(len(slots), 2, 12)
    batch = AttentionBatch(torch.tensor(slots), tuple(spans), window=window, tiles=tuple(parts))
    expected = reference.attend(q, k, v, cache.clone(), batch)
    assert torch.allclose(invariant.attend(q, k, v, cache.clone(), batch), expected, atol=1e-5, rtol=1e-4)


def test_what_the_mode_cannot_keep_is_refused(tiny_model):
    """Steps ahead of the last result, or a model that is not whole: ValueError at the start."""
    with pytest.raises(ValueError, match="one process"):
        EngineConfig(
            model_len=8, num_blocks=8, max_num_batched_tokens=64, deterministic=True, tensor_parallel=2
        ).checked()
    with pytest.raises(ValueError, match="async_depth"):
        tiny_llama.engine(tiny_model, deterministic=True, async_depth=1)

    class Part:
        config = load_model(tiny_model).config

    with pytest.raises(ValueError, match="whole model"):
        Runner(Part(), EngineConfig(model_len=8, num_blocks=8, max_num_batched_tokens=64, deterministic=True))
