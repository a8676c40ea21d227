"""What FlashInfer is told, and when: a stand-in computes from the plan's arrays what the library would."""

import dataclasses
import random

import pytest
import structlog
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.attention import paged, reference, select
from cloud_engine.attention.batch import UNLIMITED, AttentionBatch, Kernel, pack, span
from cloud_engine.attention.flashinfer import FlashInferAttention, pages

CPU = torch.device("cpu")
BLOCK, HEADS, KV_HEADS, DIM = 4, 6, 2, 16
MIXED = [(1, 3), (1, 17), (4, 4), (27, 40), (2, 8)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=6), st.integers(1, 9))
def test_pages_lead_to_the_slots_of_the_block_tables(lengths, block_size):
    """Read as FlashInfer reads them, they give each sequence's slots in order; the last block is never empty."""
    rng, sequences = random.Random(0), []
    for count, history in lengths:
        blocks = -(-(count + history) // block_size)
        sequences.append((count, count + history, [rng.randrange(99) for _ in range(blocks + 2)]))
    told = pages(sequences, block_size)
    for index, (count, context, table) in enumerate(sequences):
        blocks = told.indices[told.indptr[index] : told.indptr[index + 1]]
        full = [(block, at) for block in blocks[:-1] for at in range(block_size)]
        assert 1 <= told.last[index] <= block_size
        slots = full + [(blocks[-1], at) for at in range(told.last[index])]
        assert slots == [(table[at // block_size], at % block_size) for at in range(context)]
        assert told.rows[index + 1] - told.rows[index] == count


class StandIn:
    """FlashInfer's wrapper: causal attention over CSR pages, from what `plan` was told alone."""

    def __init__(self) -> None:
        self.plans: list[tuple[object, ...]] = []

    def plan(self, rows, indptr, indices, last, heads, kv_heads, dim, block_size, **options) -> None:
        assert (heads, kv_heads, dim, block_size) == (HEADS, KV_HEADS, DIM, BLOCK)
        assert options["causal"]
        assert all(tensor.dtype is torch.int32 for tensor in (rows, indptr, indices, last))
        self.plans.append((rows.tolist(), indptr.tolist(), indices.tolist(), last.tolist(), options["window_left"]))

    def run(self, q, caches):
        rows, indptr, indices, last, left = self.plans[-1]
        cache, spans = torch.stack(caches), []
        for index in range(len(last)):
            count, blocks = rows[index + 1] - rows[index], indices[indptr[index] : indptr[index + 1]]
            context = (len(blocks) - 1) * BLOCK + last[index]
            spans.append(span(rows[index], count, context, blocks, BLOCK, CPU))
        window = None if left == -1 else left + 1
        nothing = torch.zeros(0, KV_HEADS, DIM)
        batch = AttentionBatch(torch.zeros(0, dtype=torch.int64), tuple(spans), window=window)
        return reference.attend(q, nothing, nothing, cache, batch)


def step(sequences, window=UNLIMITED):
    """Inputs of a layer, and the step told in both ways."""
    noise, free = torch.Generator().manual_seed(0), list(range(1, 60))
    random.Random(0).shuffle(free)
    told = [(count, context, [free.pop() for _ in range(-(-context // BLOCK))]) for count, context in sequences]
    rows = sum(count for count, _ in sequences)
    q, k, v = (torch.randn(rows, heads, DIM, generator=noise) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache = torch.randn(2, 60, BLOCK, KV_HEADS, DIM, generator=noise)
    slots, spans = [], []
    for count, context, table in told:
        spans.append(span(len(slots), count, context, table, BLOCK, CPU))
        slots += [table[at // BLOCK] * BLOCK + at % BLOCK for at in range(context - count, context)]
    limit = None if window == UNLIMITED else window
    packed = pack(told, BLOCK, CPU, window)
    return (q, k, v, cache), AttentionBatch(torch.tensor(slots), tuple(spans), window=limit, packed=packed)


def attention(events):
    def fence():
        events.append("fence")
        return lambda: events.append("wait")

    def decode(q, k, v, cache, batch):
        events.append("decode")
        return reference.attend(q, k, v, cache, batch)

    made: list[StandIn] = []

    def make():
        made.append(StandIn())
        return made[-1]

    return FlashInferAttention(decode, make, fence), made


@pytest.mark.parametrize("window", [UNLIMITED, 6])
def test_a_planned_step_equals_the_reference(window):
    """Chunks with and without history beside decodes: keys are written, pages and windows are those of the step."""
    (q, k, v, cache), batch = step(MIXED, window)
    other = cache.clone()
    actual = attention([])[0](q, k, v, cache, batch)
    expected = reference.attend(q, k, v, other, batch)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(cache, other)


def test_a_step_is_planned_once_and_decodes_not_at_all():
    """Layers that share a window share a plan; the next step's plan waits until the last one is copied, and each
    window has memory of its own."""
    events: list[str] = []
    attend, made = attention(events)
    (q, k, v, cache), first = step(MIXED)
    for scales in ((1.0, 1.0), (2.0, 0.5)):
        attend(q, k, v, cache, dataclasses.replace(first, scales=scales))
    assert events == ["fence"]
    attend(q, k, v, cache, step(MIXED, 6)[1])
    assert events == ["fence", "fence"]
    assert [len(wrapper.plans) for wrapper in made] == [1, 1]
    attend(q, k, v, cache, step(MIXED)[1])
    assert events == ["fence", "fence", "wait", "fence"]
    assert [len(wrapper.plans) for wrapper in made] == [2, 1]
    inputs, decodes = step([(1, 5), (1, 9)])
    attend(*inputs, decodes)
    assert events[4:] == ["decode"]


SHAPE = select.Shape(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, block_size=BLOCK, dtype=torch.float32, device=CPU)
OURS = Kernel("ours", paged.attend)


@pytest.mark.parametrize(("rivals", "ours", "chosen"), [(1.0, 2.0, "rival"), (2.0, 1.0, "ours"), (1.0, 1.0, "ours")])
def test_a_rival_must_win(rivals, ours, chosen, monkeypatch):
    """The faster of both computes prompts; the log has the times. The clock says how long each took."""
    monkeypatch.setattr(select, "CHUNK", 8)
    monkeypatch.setattr(select, "HISTORY", 8)
    rival = Kernel("rival", paged.attend)
    times = iter([tick for took in (rivals, ours) for run in range(select.RUNS) for tick in (0.0, took + run)])
    with structlog.testing.capture_logs() as logs:
        kernel = select.challenged(OURS, SHAPE, lambda kernel, shape: rival, lambda: next(times))
    assert kernel.name == chosen
    assert logs == [
        {"event": "attention", "prompt_ms": {"rival": rivals * 1e3, "ours": ours * 1e3}, "log_level": "info"}
    ]


def missing(kernel, shape):
    raise ImportError("No module named 'flashinfer'")


def wrong(q, k, v, cache, batch):
    return paged.attend(q, k, v, cache, batch) + 1


@pytest.mark.parametrize(
    ("load", "reason"),
    [(missing, "ImportError: No module named 'flashinfer'"), (lambda *_: Kernel("wrong", wrong), "WrongResult")],
    ids=["missing", "wrong"],
)
def test_a_rival_that_is_missing_or_errs_does_not_count(load, reason):
    """The kernel at hand stays, and the log says why it stands alone."""
    with structlog.testing.capture_logs() as logs:
        assert select.challenged(OURS, SHAPE, load) is OURS
    assert logs[0]["without"].startswith(reason)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and FlashInfer")
def test_flashinfer_equals_the_reference_on_cuda():
    """The library itself, on the steps that kernels are checked with."""
    pytest.importorskip("flashinfer", reason="needs the extra `flashinfer`")
    shape = select.Shape(8, 2, 128, 16, torch.bfloat16, torch.device("cuda"))
    select.check(select.flashinfer(select.triton(shape), shape), shape)
