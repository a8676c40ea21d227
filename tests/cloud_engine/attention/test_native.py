"""The compiled kernel against the reference."""

import math

import pytest
import tiny_llama
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.attention import reference
from cloud_engine.attention.batch import UNLIMITED, AttentionBatch, pack, span
from cloud_engine.attention.native import NativeAttention
from cloud_engine.attention.select import TOLERANCE
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.runner import Runner
from cloud_engine.model.weights import load_model
from shared.schemas import Sampling

CPU = torch.device("cpu")


class Case:
    """Sequences given as (count of new tokens, context); their blocks are scattered, unused slots poisoned."""

    def __init__(
        self, sequences, *, heads=6, kv_heads=2, dim=16, block=4, dtype=torch.float32, poison=math.nan, window=None
    ):
        noise = torch.Generator().manual_seed(1)
        total = sum(count for count, _ in sequences)
        # As in a model: q, k and v are parts of one tensor.
        qkv = torch.randn(total, heads + 2 * kv_heads, dim, generator=noise).to(dtype)
        self.q, self.k, self.v = qkv.split_with_sizes([heads, kv_heads, kv_heads], dim=1)
        used = [-(-context // block) for _, context in sequences]
        free = (torch.randperm(sum(used) + 3, generator=noise) + 1).tolist()
        self.cache = torch.full((2, len(free) + 1, block, kv_heads, dim), poison, dtype=dtype)
        self.cache[:, 0] = 0
        slots, spans, packed = [], [], []
        for (count, context), blocks in zip(sequences, used, strict=True):
            table = [free.pop() for _ in range(blocks)]
            for at in range(context - count):
                hidden = window is not None and at <= context - count - window
                past = (
                    torch.full((2, kv_heads, dim), poison) if hidden else torch.randn(2, kv_heads, dim, generator=noise)
                )
                self.cache[:, table[at // block], at % block] = past.to(dtype)
            spans.append(span(len(slots), count, context, table, block, CPU, window))
            packed.append((count, context, table))
            slots += [table[at // block] * block + at % block for at in range(context - count, context)]
        limit = UNLIMITED if window is None else window
        self.batch = AttentionBatch(
            torch.tensor(slots), tuple(spans), window=window, packed=pack(packed, block, CPU, window=limit)
        )

    def run(self, attend):
        cache = self.cache.clone()
        return attend(self.q, self.k, self.v, cache, self.batch), cache

    def check(self):
        expected, written = self.run(reference.attend)
        actual, cache = self.run(NativeAttention(self.q.dtype, self.q.shape[2]))
        tolerance = TOLERANCE[self.q.dtype]
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(cache, written, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
def test_it_equals_the_reference(dtype, dim):
    """Decodes, chunks with history and whole prompts in one step, whatever unused slots hold (here NaN)."""
    lengths = [(1, 1), (1, 4), (1, 5), (1, 66), (3, 3), (7, 19), (40, 40), (33, 130), (1, 64)]
    Case(lengths, dtype=dtype, dim=dim).check()


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(
        st.tuples(st.integers(1, 90), st.integers(0, 150)).map(lambda pair: (pair[0], sum(pair))),
        min_size=1,
        max_size=12,
    ),
    block=st.sampled_from([1, 4, 16]),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (12, 3), (5, 1)]),
    window=st.sampled_from([None, 1, 5, 64, 100]),
)
def test_it_equals_the_reference_for_any_step(sequences, block, heads, window):
    """Any mix of lengths, groups of heads, block sizes and windows; blocks out of sight hold NaN."""
    Case(sequences, block=block, heads=heads[0], kv_heads=heads[1], window=window).check()


@pytest.mark.parametrize("window", [None, 1500])
@pytest.mark.parametrize("count", [1, 3])
def test_long_contexts_are_divided_and_merged(count, window):
    """More keys than a segment has; also where the window begins in mid-segment."""
    Case([(count, 2500), (1, 1024), (1, 1025)], block=16, window=window).check()


def test_a_sequence_gets_the_same_in_any_batch():
    """Bit for bit: alone, or among others enough to divide the work otherwise."""
    alone = Case([(1, 1200)], block=16)
    attend = NativeAttention(torch.float32, 16)
    expected, _ = alone.run(attend)
    many = Case([(1, 1200), *[(1, 30)] * 20], block=16)
    rows = slice(0, 1)
    many.q, many.k, many.v = (
        torch.cat((mine, theirs[1:]))
        for mine, theirs in zip((alone.q, alone.k, alone.v), (many.q, many.k, many.v), strict=True)
    )
    for at in range(1200):
        source, to = (divmod(_slot(case, at), 16) for case in (alone, many))
        many.cache[:, to[0], to[1]] = alone.cache[:, source[0], source[1]]
    assert torch.equal(many.run(attend)[0][rows], expected)


def _slot(case, at):
    return int(case.batch.packed.tables[0, at // 16]) * 16 + at % 16


@pytest.mark.parametrize("slot", [-1, 10**6])
def test_a_slot_outside_the_cache_is_an_error(slot):
    """It is refused before anything is written."""
    case = Case([(1, 5), (2, 9)])
    case.batch.slots[1] = slot
    cache = case.cache.clone()
    with pytest.raises(IndexError):
        NativeAttention(torch.float32, 16)(case.q, case.k, case.v, cache, case.batch)
    torch.testing.assert_close(cache, case.cache, equal_nan=True, atol=0, rtol=0)


def test_a_sequence_reads_what_another_writes_in_the_same_step():
    """Two equal prompts in one step share a block, which only the second of them writes."""
    case = Case([(8, 8)], block=4)
    attend = NativeAttention(torch.float32, 16)
    expected, _ = case.run(attend)
    first, second = case.batch.packed.tables[0].tolist()
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    slots = torch.tensor([second * 4 + at for at in range(4)] + [first * 4 + at for at in range(4)])
    batch = AttentionBatch(slots, packed=pack([(4, 8, [first, second]), (4, 4, [first])], 4, CPU))
    actual = attend(case.q[order], case.k[order], case.v[order], case.cache.clone(), batch)
    torch.testing.assert_close(actual, expected[order], atol=1e-5, rtol=1e-5)


def test_an_engine_on_it_gives_the_naive_loops_tokens(tmp_path):
    """Chunks, decodes and preemption through the runner's packed steps."""
    model = load_model(tiny_llama.save(tmp_path, head_dim=16)).pack()
    config = EngineConfig(
        model_len=64, block_size=4, num_blocks=17, max_num_seqs=4, max_num_batched_tokens=16, prefix_caching=False
    )
    engine = Engine(Runner(model, config, NativeAttention(torch.float32, 16), packed=True))
    prompts = [[(7 * at * at + 31 * seed) % 256 + 3 for at in range(11 + 5 * seed)] for seed in range(5)]
    added = [
        engine.add(str(at), prompt, Sampling(temperature=0, max_tokens=12, ignore_eos=True))
        for at, prompt in enumerate(prompts)
    ]
    while engine.has_work:
        engine.step()
    assert engine.stats().preemptions, "the pool is too small for all"
    oracle = tiny_llama.llama(head_dim=16)
    assert [sequence.output for sequence in added] == [
        tiny_llama.naive_greedy(prompt, 12, oracle) for prompt in prompts
    ]
