import pytest
import torch
import torch.nn.functional as F

from cloud_engine.attention import paged, reference
from cloud_engine.attention.batch import AttentionBatch, decodes, first_block, span

BLOCK, HEADS, KV_HEADS, DIM, BLOCKS = 4, 6, 2, 8, 40
CPU = torch.device("cpu")


class Case:
    """Sequences given as (count of new tokens, context, block table); their past is in the cache, other slots NaN."""

    def __init__(self, sequences, *, padded=False, poison=float("nan"), window=None) -> None:
        self.sequences, self.window, self.past = sequences, window, []
        generator = torch.Generator().manual_seed(1)
        total = sum(count for count, _, _ in sequences)
        self.q = torch.randn(total, HEADS, DIM, generator=generator)
        self.k = torch.randn(total, KV_HEADS, DIM, generator=generator)
        self.v = torch.randn(total, KV_HEADS, DIM, generator=generator)
        self.cache = torch.full((2, BLOCKS, BLOCK, KV_HEADS, DIM), poison)
        self.cache[:, 0] = 0
        slots, spans, single = [], [], []
        for count, context, table in sequences:
            row = len(slots)
            self.past.append(torch.randn(context - count, 2, KV_HEADS, DIM, generator=generator))
            out_of_sight = first_block(context, count, BLOCK, window)
            for position, past in enumerate(self.past[-1]):
                if position // BLOCK >= out_of_sight:
                    self.cache[:, table[position // BLOCK], position % BLOCK] = past
            slots += [table[at // BLOCK] * BLOCK + at % BLOCK for at in range(context - count, context)]
            if padded and count == 1:
                single.append((row, context, table))
            else:
                spans.append(span(row, count, context, table, BLOCK, CPU, window))
        grouped = (decodes(single, BLOCK, self.q, window),) if single else ()
        self.batch = AttentionBatch(torch.tensor(slots), tuple(spans), grouped, window)

    def run(self, attend):
        cache = self.cache.clone()
        return attend(self.q, self.k, self.v, cache, self.batch), cache

    def dense(self):
        """By the definition, from the keys and values themselves: no cache, no table, no batch."""
        out, row = [], 0
        for (count, context, _), past in zip(self.sequences, self.past, strict=True):
            rows = slice(row, row := row + count)
            keys, values = (torch.cat((past[:, at], new[rows])) for at, new in enumerate((self.k, self.v)))
            at, key = torch.arange(context - count, context)[:, None], torch.arange(context)
            mask = (key <= at) & (key > at - (self.window or context))
            q, k, v = (x.transpose(0, 1)[None] for x in (self.q[rows], keys, values))
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(out)


CASES = {
    "one decode": [(1, 7, [3, 9])],
    "decode at a block's first slot": [(1, 9, [3, 9, 1])],
    "first token": [(1, 1, [5])],
    "whole prompt": [(11, 11, [7, 2, 30])],
    "chunk with history": [(5, 14, [7, 2, 30, 4])],
    "consecutive blocks": [(1, 14, [4, 5, 6, 7]), (6, 13, [10, 11, 12, 13])],
    "table longer than the context": [(1, 5, [8, 20, 21, 22]), (3, 6, [9, 10, 11])],
    "mixed": [(1, 3, [1]), (1, 17, [9, 3, 20, 2, 30]), (4, 4, [5]), (7, 10, [6, 8, 7]), (1, 8, [12, 11])],
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_fast_path_equals_the_reference(name, padded):
    """Every mix of chunks and decodes gives what the definition gives, whatever unused slots hold (here NaN)."""
    case = Case(CASES[name], padded=padded)
    expected, written = case.run(reference.attend)
    actual, cache = case.run(paged.attend)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache, written, equal_nan=True, atol=0, rtol=0)
    assert actual.isfinite().all()


@pytest.mark.parametrize("poison", [1e30, -1e30])
def test_large_values_in_unused_slots_do_not_leak(poison):
    """Masked keys do not count, however large."""
    case = Case(CASES["mixed"], padded=True, poison=poison)
    expected, _ = case.run(reference.attend)
    torch.testing.assert_close(case.run(paged.attend)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_reference_is_causal_attention():
    """On one whole prompt the reference equals torch's own causal attention with repeated key heads."""
    case = Case(CASES["whole prompt"])
    q, k, v = (x.transpose(0, 1)[None] for x in (case.q, case.k, case.v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(case.run(reference.attend)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attend", [reference.attend, paged.attend])
def test_a_sequence_reads_what_another_writes_in_the_same_step(attend):
    """The second sequence shares the block that the first fills in this very step, and comes first in the batch."""
    prompt = Case([(8, 8, [3, 4])])
    expected = prompt.run(attend)[0]
    cache = torch.full_like(prompt.cache, float("nan"))
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    batch = AttentionBatch(
        torch.tensor([5 * BLOCK + at for at in range(4)] + [3 * BLOCK + at for at in range(4)]),
        (span(0, 4, 8, [3, 5], BLOCK, CPU), span(4, 4, 4, [3], BLOCK, CPU)),
    )
    actual = attend(prompt.q[order], prompt.k[order], prompt.v[order], cache, batch)
    torch.testing.assert_close(actual, expected[order], atol=1e-5, rtol=1e-5)


def test_a_slot_outside_the_cache_is_an_error():
    """A negative or too large slot is refused: an index of -1 must not overwrite the last slot."""
    case = Case(CASES["one decode"])
    for slot in (-1, BLOCKS * BLOCK):
        batch = AttentionBatch(torch.tensor([slot]), case.batch.spans)
        with pytest.raises((IndexError, RuntimeError)):
            paged.attend(case.q, case.k, case.v, case.cache, batch)


WINDOWED = CASES | {
    "long decode": [(1, 31, [3, 9, 1, 2, 30, 4, 6, 5])],
    "window begins a block": [(1, 11, [3, 9, 1]), (1, 12, [4, 5, 6])],
    "long chunk": [(9, 31, [3, 9, 1, 2, 30, 4, 6, 5])],
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [1, 3, 4, 7, 64])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_hides_what_lies_before_it(name, window, padded):
    """Both kernels see the last `window` tokens and no others: they equal dense attention under that mask, computed
    from each sequence's keys and values in order, though blocks out of sight hold NaN."""
    case = Case(WINDOWED[name], padded=padded, window=window)
    for attend in (reference.attend, paged.attend):
        actual, _ = case.run(attend)
        torch.testing.assert_close(actual, case.dense(), atol=1e-5, rtol=1e-5)
